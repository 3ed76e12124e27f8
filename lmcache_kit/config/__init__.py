"""Configuration: what LMCache's users already have, and where each value came from."""

from lmcache_kit.config.load import Loaded, load_config
from lmcache_kit.config.model import KitConfig

__all__ = ["KitConfig", "Loaded", "load_config"]
