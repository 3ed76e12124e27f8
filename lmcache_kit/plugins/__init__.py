"""Find plugins, load each on its own, and look up by name what they offer.

1. A plugin that fails is data (:class:`Failure`), never an exception: all others go on.
2. Names select, order never does. A name that two distributions offer is usable from neither.
3. Nothing of a plugin but its declarations is imported before its name is asked for.
4. Every message names plugin, distribution, cause and remedy.
5. This package and the hook specs alone touch pluggy and entry points.
"""

from lmcache_kit.plugins.records import Failure, Offer, PluginInfo
from lmcache_kit.plugins.registry import BUILTIN_POLICIES, Plugins

__all__ = ["BUILTIN_POLICIES", "Failure", "Offer", "PluginInfo", "Plugins"]
