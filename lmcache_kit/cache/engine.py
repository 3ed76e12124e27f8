"""The cache engine."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING

from lmcache_kit.cache import validation
from lmcache_kit.cache.counters import COUNTERS
from lmcache_kit.cache.index.chunk_index import MemoryIndex
from lmcache_kit.cache.index.entries import NamespaceState, Payload, RankLayout
from lmcache_kit.cache.index.leases import Leases
from lmcache_kit.cache.lookup import Lookups, Query, Search
from lmcache_kit.cache.memory.decoding import Decoder
from lmcache_kit.cache.memory.pending_stores import PendingStores
from lmcache_kit.cache.memory.transcoding import Transcoded, Transcoder
from lmcache_kit.cache.memory.transfers import GetCodec, Transfers
from lmcache_kit.cache.records import (
    Grant,
    Match,
    StoreItem,
)
from lmcache_kit.cache.tier_base import Tier
from lmcache_kit.cache.tiers.lower_tiers import LowerTiers
from lmcache_kit.cache.tiers.promotion import Promotions
from lmcache_kit.keys import ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.tiers.store_tier import StoreTier
    from lmcache_kit.interfaces import Codec, EvictionPolicy, MemoryBackend

MAX_LOADERS = 4


class CacheEngine(Tier):
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

    _index: MemoryIndex

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
        index = MemoryIndex(backend, policy)
        super().__init__(
            location,
            index,
            int(index.capacity_bytes * max_pinned_share),
            Counter(dict.fromkeys(COUNTERS, 0)),
            threading.RLock(),
            clock,
        )
        self._ttl_s = lease_ttl_s
        self._leases = Leases(lease_ttl_s, clock)
        self._stores = PendingStores(self._index, self._counters, clock)
        self._loaders = loaders or ThreadPoolExecutor(
            min(MAX_LOADERS, len(os.sched_getaffinity(0))), thread_name_prefix="lmcache-kit-load"
        )
        decoder = Decoder(self._index, self._counters, self._lock, self._loaders)
        self._lookups = Lookups(self._index, self._leases, decoder, self._counters)
        self._transcoder = Transcoder(self._index, self._pins, decoder, self._counters, self._lock)
        self.transfers = Transfers(
            self._index, self.references, self._leases, self._counters, self._lock, clock
        )
        self.lower_tiers: LowerTiers | None = None
        self._closed = False

    def attach(self, tiers: Sequence[StoreTier], get_codec: GetCodec) -> LowerTiers:
        """Put tiers below memory, once: lookups find what lies there. Who closes the engine closes
        them first."""
        promoted = Transfers(
            self._index,
            self.references,
            self._leases,
            self._counters,
            self._lock,
            self._clock,
            "promoted",
        )
        promotions = Promotions(
            tiers,
            self._index,
            promoted,
            self._lookups,
            get_codec,
            references=self.references,
            counters=self._counters,
            lock=self._lock,
        )
        self.lower_tiers = LowerTiers(tiers, self, promotions)
        return self.lower_tiers

    @property
    def locations(self) -> dict[str, Tier]:
        """By location: ourselves, and the tiers below."""
        return {each.location: each for each in (self, *(self.lower_tiers or ()))}

    @property
    def memory(self) -> MemoryBackend:
        """Where the chunks lie."""
        return self._index.memory

    # Reading.

    def lookup(  # noqa: PLR0917 - what is wanted, by whom: one fact each
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
        search = self.begin_lookup(namespace, tokens, chunk_size, world_size, owner, ready.set)
        if search.waiting:
            ready.wait(wait_s)
        return self.finish_lookup(search)

    def begin_lookup(  # noqa: PLR0917 - as lookup
        self,
        namespace: bytes,
        tokens: bytes,
        chunk_size: int,
        world_size: int,
        owner: Hashable,
        on_ready: Callable[[], None],
    ) -> Search:
        """Do what :meth:`lookup` does before it waits, which it must if ``waiting`` is not 0.
        ``on_ready`` is called then, from any thread; but not to wait for it is allowed, too."""
        validation.check_shape(namespace, chunk_size, world_size)
        validation.check_lookup(tokens)
        query = Query(namespace, tokens, chunk_size, world_size)
        search = Search(query, owner, on_ready)
        with self._lock:
            walk = self._lookups.walk(query)
            if self.lower_tiers is None or not self.lower_tiers.promotions.begin(search, walk):
                self._lookups.begin(search, walk)
        return search

    def finish_lookup(self, search: Search) -> Match:
        """Do the rest, once."""
        with self._lock:
            if self.lower_tiers and search.promotion:
                self.lower_tiers.promotions.cancel(search.promotion)
                self._lookups.begin(search, self._lookups.walk(search.query))
            return self._lookups.finish(search)

    def release(self, lease: int, rank: int | None) -> bool:
        """One rank is done with a lease, or all are (None). False when it did not hold it."""
        with self._lock:
            payloads = self._leases.release(lease, rank)
            self._release_unused(payloads or ())
            return payloads is not None

    def drop_corrupt(self, key: ChunkKey) -> bool:
        """Forget a chunk whose bytes are not what was stored. False when it is not here."""
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is None or not entry.complete:
                return False
            self._counters["corrupt_total"] += 1
            self._index.unlink(entry)
            return True

    # Writing.

    def allocate(  # noqa: PLR0917 - what is stored, by whom: one fact each
        self,
        namespace: bytes,
        rank: int,
        world_size: int,
        chunk_size: int,
        items: Sequence[StoreItem],
        owner: Hashable,
        rank_layout: RankLayout | None = None,
    ) -> list[Grant]:
        """Memory for one rank's payloads of some chunks; one grant per item, in order.

        ``present``: it is stored, or this rank's part of it is being stored. ``refused``: it is
        larger than the whole memory, or too much of that is in use; so is all that follows it
        in this batch. Only payloads of ranks that declare a ``rank_layout`` can be
        encoded.
        """
        validation.check_shape(namespace, chunk_size, world_size)
        validation.check_store(items, rank, world_size, chunk_size)
        with self._lock:
            self._expire_holds()
            state = self._index.namespace(namespace, chunk_size, world_size)
            state = state or NamespaceState(namespace, chunk_size, world_size)
            if rank_layout is not None:
                state.rank_layouts[rank] = rank_layout
            return self._stores.allocate(state, rank, items, owner)

    def commit(self, written: Sequence[tuple[int, int]], owner: Hashable) -> int:
        """The payloads of these ``(ticket, checksum)`` are written. Returns how many counted."""
        validation.check_written(written)
        with self._lock:
            return sum([self._stores.commit(*pair, owner) for pair in written])

    def abandon(self, tickets: Sequence[int], owner: Hashable) -> int:
        """These will not be written, so what other ranks wrote of these chunks goes too."""
        with self._lock:
            return sum([self._stores.abandon(ticket, owner) for ticket in tickets])

    # What operators ask for, beside what every inventory offers.

    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`; those who read the raw bytes keep
        them until they are done."""
        return self._transcoder.encode(key, method, codec)

    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        return self._transcoder.decode(key, method)

    # The end of things.

    def drop_owner(self, owner: Hashable) -> None:
        """An owner has died: its leases end, and what it was storing goes."""
        with self._lock:
            self._release_unused(self._leases.release_owner(owner))
            self._stores.abandon_owner(owner)
            if self.lower_tiers:
                self.lower_tiers.promotions.drop_owner(owner)

    def expire(self) -> int:
        """End leases that have outlived their time; returns how many.

        So do pins. Chunks that some rank stored and another never began to, for as long, go too.
        """
        if self.lower_tiers:
            self.lower_tiers.expire()
        with self._lock:
            ended = self._expire_holds()
            self._stores.expire(self._clock() - self._ttl_s)
            return ended

    def stats(self) -> dict[str, float]:
        """Counters, whose names end in ``_total``, and gauges."""
        tiers = self.lower_tiers.stats() if self.lower_tiers else {}
        with self._lock:
            usage = self._index.memory.usage()
            pending = len(self._index.pending)
            return {
                **self._counters,
                "chunks": len(self._index.entries) - pending,
                "pending": pending,
                "encoded_chunks": self._index.encoded,
                "leases": len(self._leases),
                "writers": len(self._stores),
                "pins": len(self._pins),
                "pinned_bytes": self._pins.pinned_bytes,
                "namespaces": len(self._index.namespaces),
                "capacity_bytes": usage.capacity_bytes,
                "requested_bytes": usage.requested_bytes,
                "allocated_bytes": usage.allocated_bytes,
                "largest_free_bytes": usage.largest_free_bytes,
                "external_fragmentation": usage.external_fragmentation,
                **tiers,
            }

    def close(self) -> None:
        """Forget everything and close the backend; waits for what is being decoded. Safe to call
        twice."""
        self._loaders.shutdown(cancel_futures=True)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._index.listeners.clear()
                for entry in list(self._index.entries.values()):
                    self._index.unlink(entry)
                self._index.memory.close()

    def _expire_holds(self) -> int:
        super()._expire_holds()
        ended, payloads = self._leases.release_expired()
        self._counters["expired_leases_total"] += ended
        self._release_unused(payloads)
        return ended

    def _release_unused(self, payloads: Sequence[Payload]) -> None:
        for payload in payloads:
            self._index.release_if_unused(payload)
