"""The cache engine: which chunks are stored where, for how long, and which leave first.

1. **No sockets and no processes.** The engine is a library; whoever serves it names the owners of
   leases and stores, and reports the death of an owner.
2. **One lock and one state per tier.** :class:`~lmcache_kit.cache.index.state.TierState` owns the
   lock, the index, the holds and the counters; the parts of a tier share it.
3. **Doubt is a miss.** Bytes are verified where they are read. A chunk that is late, damaged or
   not decodable ends the match and is counted; it never raises into serving.
4. **Arrows go down**: records, then ``index``, ``memory``, ``tiers``, ``lookup``, ``engine``.
5. **Accounting is exact.** Memory is reserved before bytes are written, and freed when neither an
   entry nor a hold needs it.
"""
