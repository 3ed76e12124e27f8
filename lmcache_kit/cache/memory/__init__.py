"""The memory tier: chunks in one slab that workers map, read and write.

1. **Plan, then evict**: a request that cannot be granted evicts nothing.
2. **A chunk is found when all ranks have committed it**; until then it is pending.
3. **Old bytes serve until new ones are verified**: encoding and decoding swap payloads atomically.
4. **Every reader and writer holds a payload**; bytes are freed when the last hold ends.
"""
