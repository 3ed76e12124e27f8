"""A store, the index of what lies there, and what keeps the two in step."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from lmcache_kit.cache.counters import TIER_COUNTERS
from lmcache_kit.cache.index.entries import Entry, big_endian
from lmcache_kit.cache.memory.evictor import leaving
from lmcache_kit.cache.tier_base import Tier
from lmcache_kit.cache.tiers.blob_header import BlobHeader, packed_tight
from lmcache_kit.cache.tiers.circuit_breaker import CircuitBreaker
from lmcache_kit.cache.tiers.serial_executor import SerialExecutor
from lmcache_kit.cache.tiers.store_index import StoredPayload, StoreIndex
from lmcache_kit.errors import BackendError
from lmcache_kit.keys import KEY_BYTES, ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.descriptors import ChunkDescriptor, NamespaceInfo
    from lmcache_kit.interfaces import Backend, EvictionPolicy
    from lmcache_kit.interfaces.backend import BlobRecord

logger = logging.getLogger(__name__)

MAX_KNOWN = 1 << 20
MAX_KNOWN_SHARED = 1 << 17
"""Chunks in an index, of about two kilobytes each. A shared store is asked for what else it has."""
CLOSE_S = 5.0
_TRIES = 3
"""Holes may be smaller than what left them, where a store rounds up."""


class StoreTierBase(Tier):
    """What :class:`~lmcache_kit.cache.tiers.store_tier.StoreTier` is built on.

    All changes of the store go through ``turns``, in order. The index is what this process
    put there, found there or saw there; of a shared store it is a part.
    """

    _index: StoreIndex

    def __init__(
        self,
        backend: Backend,
        policy: EvictionPolicy,
        location: str,
        max_pinned_share: float,
        clock: Callable[[], float],
    ) -> None:
        counters = Counter(dict.fromkeys(TIER_COUNTERS, 0))
        self._breaker = CircuitBreaker(location, counters, clock)
        self._backend = backend
        budget = sys.maxsize
        with suppress(BackendError):
            # A shared one is not ours to fill, and may be far away: it is not asked.
            capacity = None if self.shared else self._breaker.call(backend.usage).capacity_bytes
            if capacity is not None:
                budget = int(capacity * max_pinned_share)
        super().__init__(location, StoreIndex(policy), budget, counters, threading.RLock(), clock)
        self.executor = SerialExecutor(location)
        self._most = MAX_KNOWN_SHARED if self.shared else MAX_KNOWN
        self._scanned = False
        self._closed = False

    @property
    def shared(self) -> bool:
        """Whether others put things there, too."""
        return self._backend.shared

    @property
    def resting(self) -> bool:
        """Whether it is left alone, because it has failed."""
        return self._breaker.resting

    def start(self) -> None:
        """Learn what lies there, in the background."""
        self.executor.enqueue(self._scan)

    def close(self) -> None:
        """Write what waits, for a few seconds, and close the store. Safe to call twice."""
        if self._closed:
            return
        self.executor.enqueue(self._sweep)
        if not self.executor.flush(CLOSE_S):
            logger.warning("%s: %d chunks were not written", self.location, self.executor.waiting)
        self._closed = True
        self.executor.cancel()
        self._backend.close()
        self.executor.join()

    def expire(self) -> None:
        """End pins that have outlived their time, and try again what failed."""
        with self._lock:
            self._expire_holds()
            idle = not self.executor.waiting and not self.resting
            unswept = bool(self._index.pending_deletes)
        if idle and not self._scanned:
            self.executor.enqueue(self._scan)
        elif idle and unswept:
            self.executor.enqueue(self._sweep)

    def stats(self) -> dict[str, float]:
        """Counters, whose names end in ``_total``, and gauges."""
        with self._lock:
            return {
                **self._counters,
                "chunks": len(self._index.entries),
                "stored_bytes": self._index.nbytes,
                "pins": len(self._pins),
                "pinned_bytes": self._pins.pinned_bytes,
                "waiting": self.executor.waiting,
                "passed_over_total": self.executor.passed_over,
                "resting": float(self.resting),
            }

    # Writing.

    def keep(
        self,
        descriptor: ChunkDescriptor,
        namespace: NamespaceInfo,
        pieces: Sequence[memoryview],
    ) -> bool:
        """:meth:`write`, unless somebody else has put it there already."""
        if self.shared and all(self._breaker.call(self._backend.contains, [descriptor.key])):
            with self._lock:
                self._learn(BlobHeader(packed_tight(descriptor), namespace))
            return True
        return self.write(descriptor, namespace, pieces)

    def write(
        self,
        descriptor: ChunkDescriptor,
        namespace: NamespaceInfo,
        pieces: Sequence[memoryview],
    ) -> bool:
        """Put a chunk there; others leave for it. False when it does not fit. To be called in
        turn. Raises BackendError."""
        header = BlobHeader(packed_tight(descriptor), namespace)
        put = False
        try:
            self._sweep()
            put = self._put(header, pieces)
        finally:
            with self._lock:
                if put:
                    self._counters["written_chunks_total"] += 1
                    self._counters["written_bytes_total"] += descriptor.nbytes
                    self._learn(header)
                else:
                    self._counters["refused_total"] += 1
        return put

    # Behind it.

    def _put(self, header: BlobHeader, pieces: Sequence[memoryview]) -> bool:
        descriptor, meta = header.descriptor, header.encode()
        for _ in range(_TRIES):
            if self._breaker.call(self._backend.put, descriptor.key, meta, pieces):
                return True
            if not self._is_findable(header) or not self._evict(descriptor):
                return False
        return False

    def _is_findable(self, header: BlobHeader) -> bool:
        """Whether what it follows is here: if not, nothing should leave for it."""
        descriptor = header.descriptor
        return descriptor.parent == descriptor.namespace[:KEY_BYTES] or self.contains(
            descriptor.parent
        )

    def _evict(self, descriptor: ChunkDescriptor) -> bool:
        """Have chunks of as many bytes leave, or none at all."""
        if self.shared:
            return False

        def may_leave(entry: Entry) -> bool:
            needed = entry.pins or entry.ref_count
            return not needed and entry.key not in (descriptor.key, descriptor.parent)

        with self._lock:
            victims, freed = list[Entry](), 0
            for victim in leaving(self._index, may_leave):
                victims.append(victim)
                freed += victim.nbytes
                if freed >= descriptor.nbytes:
                    break
            if freed < descriptor.nbytes:
                return False
            for victim in victims:
                self._index.unlink(victim)
            self._counters["evicted_chunks_total"] += len(victims)
            self._counters["evicted_bytes_total"] += freed
        self._sweep()
        return True

    def _learn(self, header: BlobHeader) -> None:
        """The store has this, under the lock. Raises ValueError when its namespace has another
        shape here."""
        descriptor, info = header
        payload = StoredPayload([], extents=descriptor.extents, blob_encoding=descriptor.encoding)
        entry = self._index.entries.get(descriptor.key)
        if entry is not None:
            self._index.detach(entry)
            self._index.attach_payload(entry, payload)
            return
        namespace = self._index.namespace_of(info)
        sort_key = big_endian(descriptor.tokens)
        entry = Entry(
            descriptor.key,
            descriptor.parent,
            namespace,
            sort_key,
            descriptor.start,
            payload,
            self._clock(),
        )
        self._index.put(entry)
        self._index.complete(entry)
        if len(self._index.entries) > self._most:
            self._drop_from_index()

    def _drop_from_index(self) -> None:
        """Know one chunk less; it stays in the store."""
        victim = next(
            leaving(self._index, lambda entry: not entry.pins and not entry.ref_count), None
        )
        if victim is not None:
            self._index.unlink(victim)
            del self._index.pending_deletes[victim.key]

    def mark_corrupt(self, key: ChunkKey, why: str) -> None:
        """What lies there is not what was put there: it goes."""
        logger.warning("%s: dropped chunk %s: %s", self.location, key.hex(), why)
        self._counters["corrupt_total"] += 1
        self._drop(key)

    def _drop(self, key: ChunkKey) -> None:
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is not None:
                self._index.unlink(entry)
            self._index.pending_deletes[key] = None
        self.executor.enqueue(self._sweep)

    def _sweep(self) -> None:
        """Remove from the store what has left the index. Raises BackendError."""
        with self._lock:
            pending_deletes = list(self._index.pending_deletes)
        if pending_deletes:
            self._breaker.call(self._backend.remove, pending_deletes)
            with self._lock:
                for key in pending_deletes:
                    del self._index.pending_deletes[key]

    def _scan(self) -> None:
        """Learn what lies there, once. Raises BackendError."""
        if self._scanned:
            return

        def scan() -> None:
            begun = self._clock()
            for number, stored in enumerate(self._backend.scan()):
                if self._closed or number >= self._most:
                    break
                self._found(stored)
            logger.info(
                "%s: %d chunks lie there, found in %.1f s",
                self.location,
                len(self._index.entries),
                self._clock() - begun,
            )

        self._breaker.call(scan)
        self._scanned = True

    def _found(self, stored: BlobRecord) -> None:
        if self.contains(stored.key) or stored.key in self._index.pending_deletes:
            return
        try:
            header = BlobHeader.decode(stored.key, stored.meta, stored.nbytes)
            with self._lock:
                self._learn(header)
        except ValueError as error:
            self.mark_corrupt(stored.key, str(error))
