"""The configuration: the keys of LMCache and of this kit, and the origin of every value.

1. A key is declared once, with type, default, scope, help and aliases. Docs, messages and the
   comparison of two cache processes derive from the declaration.
2. Later sources win: the file, then the environment, then ``kv_connector_extra_config`` of vLLM.
3. A mistake ends a start, and all mistakes are named at once, each with its place. A key of LMCache
   without effect here is a warning, one line for all; an unknown key names the nearest served one.
4. Plugins declare keys of their own. A loaded configuration holds them as options of the plugin, so
   no other code knows them.
5. Nothing is shown before what is secret is taken out, by its name and its form.
"""

from lmcache_kit.config.load import Loaded, load_config
from lmcache_kit.config.model import KitConfig

__all__ = ["KitConfig", "Loaded", "load_config"]
