"""Store tiers, below memory: blobs in a backend, and their promotion into memory.

1. **The backend keeps bytes and nothing else.** The header of a blob says all about its chunk.
2. **One thread changes a store, in order**; several threads read it.
3. **A store that fails rests**: the circuit breaker keeps it out of the way of serving.
4. **Promotion is copy and verify**: a chunk is found in memory once its checksums match.
5. **The index may be wrong about the store**: what is read corrects it.
"""
