"""lmcache_kit: a kit of small plugins that cache, find, compress and move LLM KV cache."""

__version__ = "0.1.0"

__all__ = ["__version__"]
