"""The storage backend ``LocalCPUBackend``: KV cache in shared host memory.

1. The memory is one sealed memfd that workers map: KV is written and read in place.
2. ``allocated_bytes`` never exceeds the configured capacity, rounding included.
3. Fragmentation is bounded: ``Allocator.eviction_plan`` finds a set of regions to free whenever one
   exists.
4. The backend has no lock. The engine calls it under its own.
"""
