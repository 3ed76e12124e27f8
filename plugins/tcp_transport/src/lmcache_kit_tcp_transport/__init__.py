"""lmcache_kit transport tcp."""
