"""lmcache_kit transport nixl."""
