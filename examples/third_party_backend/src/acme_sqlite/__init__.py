"""KV cache in one SQLite file: a storage backend for lmcache_kit.

1. One transaction writes a blob: readers see the old blob or the new one.
2. SQLite's ``max_page_count`` enforces the size limit.
3. One connection under a lock: simple before fast.
"""
