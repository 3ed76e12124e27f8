"""The controller: which instance holds which chunks, and operations on them.

Design principles:

1. The cache processes are the truth. Everything here is soft state, which a restart rebuilds
   within seconds from what the agents send.
2. Protocols have no sockets: registry, replicas, instances and operations take messages in and
   hand messages out, so that tests carry them by hand and lose, repeat and reorder them.
3. One event loop owns everything. Nothing waits for a cache process without a deadline, and no
   single step takes long: lookups are answered from the index alone, sweeps go piece by piece.
4. An operation has one id, starts at most once and has exactly one end, which comes by its
   deadline whatever happens to connections and processes.
5. Frontends see :class:`~lmcache_kit.interfaces.frontend.ControllerAPI`, whose two halves,
   :class:`~lmcache_kit.controller.instances.Instances` and
   :class:`~lmcache_kit.controller.operations.Operations`, do the work themselves.
"""
