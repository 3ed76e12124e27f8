"""The cache engine: the memory tier, the tiers below it, and lookups across them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from lmcache_kit.cache import validation
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.lookup import Lookups, PendingLookup
from lmcache_kit.cache.memory.memory_tier import MemoryTier
from lmcache_kit.cache.memory.transfers import GetCodec, Transfers
from lmcache_kit.cache.records import Grant, Match, Query, StoreItem
from lmcache_kit.cache.tier import Tier
from lmcache_kit.cache.tiers.lower_tiers import LowerTiers
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.interfaces import EvictionPolicy, MemoryBackend
from lmcache_kit.keys import ChunkKey

MAX_LOADERS = 4


class CacheEngine:
    """What is stored where, who reads or writes it, and what leaves when room is needed.

    A library without sockets: whoever serves it names the *owner* of each lookup and store, and
    says when an owner has died. Thread-safe; listeners are called under the lock. It takes the
    backend over, and closes it.

    A chunk has one payload per rank and is found once all ranks have committed theirs. Memory for
    all ranks is set aside with the first one, so that a chunk that one rank stores fits for all.

    >>> from lmcache_kit.cache.engine import CacheEngine
    >>> from lmcache_kit.cache.index.policies import LRU
    >>> from lmcache_kit.cache.records import StoreItem
    >>> from lmcache_kit.keys import pack_tokens
    >>> from lmcache_kit_cpu_backend.backend import LocalCPUBackend
    >>> engine = CacheEngine(LocalCPUBackend(1 << 20), LRU(), location="LocalCPUBackend")
    >>> namespace, tokens = bytes(32), pack_tokens([5, 6, 7])
    >>> item = StoreItem(namespace[:16], tokens, 300)
    >>> [grant] = engine.allocate(namespace, 0, 1, 256, [item], "me")
    >>> engine.commit([(grant.ticket, 0)], "me")
    1
    >>> match = engine.lookup(namespace, pack_tokens([5, 6, 8]), 256, 1, "me")
    >>> match.chunks[0].usable
    2
    >>> engine.release(match.lease, rank=0)
    True
    >>> engine.close()
    """

    def __init__(
        self,
        backend: MemoryBackend,
        policy: EvictionPolicy,
        *,
        location: str,
        lease_ttl_s: float = 120.0,
        max_pinned_share: float = 0.5,
        loaders: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaders = loaders or ThreadPoolExecutor(
            min(MAX_LOADERS, len(os.sched_getaffinity(0))), thread_name_prefix="lmcache-kit-load"
        )
        self.memory_tier = MemoryTier(
            backend, policy, location, lease_ttl_s, max_pinned_share, self._loaders, clock
        )
        self.lower_tiers: LowerTiers | None = None
        self._lock = self.memory_tier.state.lock
        self._stores = self.memory_tier.stores
        self._lookups = Lookups(self.memory_tier)

    def attach(self, tiers: Sequence[StoreTier], get_codec: GetCodec) -> LowerTiers:
        """Put tiers below memory, once, for lookups to search. The caller closes them before the
        engine."""
        self.lower_tiers = LowerTiers(tiers, self.memory_tier, get_codec)
        self._lookups.promotions = self.lower_tiers.promotions
        return self.lower_tiers

    @property
    def locations(self) -> dict[str, Tier]:
        """The tiers by their location, memory first."""
        return {each.location: each for each in (self.memory_tier, *(self.lower_tiers or ()))}

    @property
    def location(self) -> str:
        """The location of the memory tier."""
        return self.memory_tier.location

    @property
    def memory(self) -> MemoryBackend:
        """The backend that holds the bytes of the memory tier."""
        return self.memory_tier.backend

    @property
    def transfers(self) -> Transfers:
        """Both ends of moves out of and into memory."""
        return self.memory_tier.transfers

    # Reading.

    def lookup(  # noqa: PLR0917 - one fact each
        self,
        namespace: bytes,
        tokens: bytes,
        chunk_size: int,
        world_size: int,
        owner: Hashable,
        wait_s: float = 0.0,
    ) -> Match:
        """Find and lease the longest stored prefix of packed ``tokens``.

        Of the last chunk found only the first ``usable`` tokens need match. The lease ends when
        each rank has released it, or all at once, when its owner dies, or after its time. A chunk
        that is encoded is decoded for as long as it is leased, and one that lies in a tier below is
        brought up; where that takes longer than ``wait_s``, the prefix ends.
        """
        ready = threading.Event()
        pending = self.begin_lookup(namespace, tokens, chunk_size, world_size, owner, ready.set)
        if pending.waiting:
            ready.wait(wait_s)
        return self.finish_lookup(pending)

    def begin_lookup(  # noqa: PLR0917 - as lookup
        self,
        namespace: bytes,
        tokens: bytes,
        chunk_size: int,
        world_size: int,
        owner: Hashable,
        on_ready: Callable[[], None],
    ) -> PendingLookup:
        """Do the part of :meth:`lookup` before its wait.

        If the result is ``waiting``, ``on_ready`` will be called, from any thread. The caller may
        call :meth:`finish_lookup` before that.
        """
        validation.check_shape(namespace, chunk_size, world_size)
        validation.check_lookup(tokens)
        lookup = PendingLookup(Query(namespace, tokens, chunk_size, world_size), owner, on_ready)
        with self._lock:
            self._lookups.begin(lookup)
        return lookup

    def finish_lookup(self, lookup: PendingLookup) -> Match:
        """Do the part of :meth:`lookup` after its wait, once."""
        with self._lock:
            return self._lookups.finish(lookup)

    def release(self, lease: int, rank: int | None) -> bool:
        """End one rank's part of a lease, or all of it (None). False when it was not held."""
        return self.memory_tier.release(lease, rank)

    def drop_corrupt(self, key: ChunkKey) -> bool:
        """Delete a chunk whose bytes a reader found to be wrong. False when it is not here."""
        return self.memory_tier.drop_corrupt(key)

    # Writing.

    def allocate(  # noqa: PLR0917 - one fact each
        self,
        namespace: bytes,
        rank: int,
        world_size: int,
        chunk_size: int,
        items: Sequence[StoreItem],
        owner: Hashable,
        rank_layout: RankLayout | None = None,
    ) -> list[Grant]:
        """Reserve memory for one rank's payloads of some chunks; one grant per item, in order.

        ``present``: the chunk is stored, or this rank's payload of it is being stored.
        ``refused``: it is larger than the whole memory, or too much of that is in use; so is each
        item that follows it in this batch. Only payloads of ranks that declare a ``rank_layout``
        can be encoded.
        """
        validation.check_shape(namespace, chunk_size, world_size)
        validation.check_store(items, rank, world_size, chunk_size)
        return self.memory_tier.allocate(
            namespace, rank, world_size, chunk_size, items, owner, rank_layout
        )

    def commit(self, written: Sequence[tuple[int, int]], owner: Hashable) -> int:
        """Commit the payloads of these ``(ticket, checksum)``; returns how many counted."""
        validation.check_written(written)
        with self._lock:
            return sum([self._stores.commit(*pair, owner) for pair in written])

    def abandon(self, tickets: Sequence[int], owner: Hashable) -> int:
        """Give stores up, with what other ranks wrote of these chunks; returns how many."""
        with self._lock:
            return sum([self._stores.abandon(ticket, owner) for ticket in tickets])

    # Waiting for changes in memory.

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``predicate`` is true: see
        :meth:`~lmcache_kit.cache.index.state.TierState.wait_for`."""
        return self.memory_tier.state.wait_for(predicate, timeout_s)

    # The end of owners, leases and the engine.

    def drop_owner(self, owner: Hashable) -> None:
        """End the leases of an owner that has died, and give its stores and lookups up."""
        with self._lock:
            self.memory_tier.drop_owner(owner)
            if self.lower_tiers:
                self.lower_tiers.promotions.drop_owner(owner)

    def expire(self) -> int:
        """End leases whose time is over; returns how many.

        So do pins, and chunks that one rank stored that long ago and another never began.
        """
        if self.lower_tiers:
            self.lower_tiers.expire()
        return self.memory_tier.expire()

    def stats(self) -> dict[str, float]:
        """Return the metrics of the memory tier; those of others are in :attr:`lower_tiers`."""
        return self.memory_tier.stats()

    def close(self) -> None:
        """Drop all chunks and close the backend, when what is being decoded has ended. Safe to
        call twice."""
        self._loaders.shutdown(cancel_futures=True)
        self.memory_tier.close()
