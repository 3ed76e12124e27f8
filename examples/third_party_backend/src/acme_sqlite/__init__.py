"""KV cache in one SQLite file: a storage backend for lmcache_kit."""
