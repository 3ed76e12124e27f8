"""Find plugins, load each on its own, and look up by name what they offer.

The only package that touches pluggy and entry points, beside the hook specs themselves.
"""

from lmcache_kit.plugins.records import Failure, Offer, PluginInfo
from lmcache_kit.plugins.registry import BUILTIN_POLICIES, FIRST_PARTY, Plugins

__all__ = ["BUILTIN_POLICIES", "FIRST_PARTY", "Failure", "Offer", "PluginInfo", "Plugins"]
