"""The blob store of a tier: a backend, the index of what it holds, and all changes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing

from lmcache_kit.cache.descriptors import ChunkDescriptor, Encoding, NamespaceInfo
from lmcache_kit.cache.index.entries import Entry
from lmcache_kit.cache.index.eviction_order import eviction_order
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.records import OVER_PIN_BUDGET, Query, Transcoded
from lmcache_kit.cache.tiers.blob_header import BlobHeader, packed_tight, payloads
from lmcache_kit.cache.tiers.blob_reader import BlobReader
from lmcache_kit.cache.tiers.circuit_breaker import CircuitBreaker
from lmcache_kit.cache.tiers.serial_executor import SerialExecutor
from lmcache_kit.cache.tiers.store_index import StoredPayload, StoreIndex
from lmcache_kit.interfaces import Backend
from lmcache_kit.interfaces.backend import BlobRecord
from lmcache_kit.keys import KEY_BYTES, ChunkKey, chain

logger = logging.getLogger(__name__)

MAX_KNOWN = 1 << 20
MAX_KNOWN_SHARED = 1 << 17
"""Limits of an index, in chunks of about two kilobytes each. A shared store is asked for others."""
CLOSE_S = 5.0
_TRIES = 3
"""Freed room may be fragmented where a store rounds sizes up."""


class BlobStore:
    """Reads and writes chunks of one tier as blobs. Thread-safe.

    All changes of the store run on ``executor``, in order. The index holds what this process put,
    found or saw in the store; of a shared store it covers a part.
    """

    def __init__(
        self,
        backend: Backend,
        state: TierState[StoreIndex],
        breaker: CircuitBreaker,
        max_pinned_share: float,
    ) -> None:
        self.location = state.location
        self.max_entries = MAX_KNOWN_SHARED if backend.shared else MAX_KNOWN
        self.executor = SerialExecutor(state.location)
        self._backend = backend
        self._breaker = breaker
        self._max_pinned_share = max_pinned_share
        self._state = state
        self._index = state.index
        self._pins = state.pins
        self._counters = state.counters
        self._lock = state.lock
        self._clock = state.clock
        self._scanned = False
        self._closed = False

    @property
    def shared(self) -> bool:
        """Whether other processes put blobs there, too."""
        return self._backend.shared

    @property
    def resting(self) -> bool:
        """Whether the circuit breaker refuses calls now."""
        return self._breaker.resting

    @property
    def why_down(self) -> str:
        """Why the last call of the store failed; empty when it worked."""
        return self._breaker.why_down

    def start(self) -> None:
        """Scan the store in the background."""
        self.executor.enqueue(self._scan)

    def close(self) -> None:
        """Write what waits, for a few seconds, and close the store. Safe to call twice."""
        if self._closed:
            return
        self.executor.enqueue(self.sweep)
        if not self.executor.flush(CLOSE_S):
            logger.warning("%s: %d chunks were not written", self.location, self.executor.waiting)
        self._closed = True
        self.executor.cancel()
        self._backend.close()
        self.executor.join()

    def retry(self) -> None:
        """Enqueue again what failed: the scan, or else removals."""
        with self._lock:
            idle = not self.executor.waiting and not self.resting
            unswept = bool(self._index.pending_deletes)
        if idle and not self._scanned:
            self.executor.enqueue(self._scan)
        elif idle and unswept:
            self.executor.enqueue(self.sweep)

    def contains(self, key: ChunkKey) -> bool:
        """Whether the index has a chunk."""
        entry = self._index.entries.get(key)
        return entry is not None and entry.complete

    # Reading.

    def match_index(self, query: Query, start: int, parent: ChunkKey) -> list[tuple[ChunkKey, int]]:
        """Return the chunks of the index that go on with the tokens from ``start`` on.

        ``start`` follows the chunk ``parent``. Each key comes with how many of its tokens agree.
        """
        with self._lock:
            namespace = self._index.namespaces.get(query.namespace)
            shape = (query.chunk_size, query.world_size)
            if namespace is None or (namespace.chunk_size, namespace.world_size) != shape:
                return []
            walk = self._index.walk(namespace, query.tokens, start, parent)
            self._index.touch(walk)
            return [(located.key, located.usable) for located, _ in walk]

    def match_store(self, query: Query, start: int, parent: ChunkKey) -> list[tuple[ChunkKey, int]]:
        """Do the same by asking the store, for whole chunks only. Raises BackendError."""
        links = list(
            chain(query.namespace, query.tokens, query.chunk_size, start=start, parent=parent)
        )
        there = self._breaker.call(self._backend.contains, [link.key for link in links])
        missing = there.index(False) if False in there else len(links)
        return [(link.key, link.end - link.start) for link in links[:missing]]

    def open(self, key: ChunkKey) -> tuple[BlobHeader, BlobReader] | None:
        """Open a blob. Its header is verified, its data is not.

        None if there is no usable blob. The caller closes the reader. Raises BackendError.
        """
        if key in self._index.pending_deletes:
            return None
        blob = self._breaker.call(self._backend.get, key)
        if blob is None:
            self._drop(key)
            return None
        reader = BlobReader(blob, self._breaker)
        try:
            header = BlobHeader.decode(key, blob.meta, reader.nbytes)
            with self._lock:
                known = self._index.entries.get(key)
                if known is None or known.payload.extents != header.descriptor.extents:
                    self._enter(header)
        except ValueError as error:
            reader.close()
            self.mark_corrupt(key, str(error))
            return None
        with self._lock:
            self._counters["read_chunks_total"] += 1
            self._counters["read_bytes_total"] += header.descriptor.nbytes
        return header, reader

    def read(self, key: ChunkKey) -> tuple[BlobHeader, list[memoryview]] | None:
        """Read a blob, with the bytes of each rank; see :meth:`open`."""
        opened = self.open(key)
        if opened is None:
            return None
        header, reader = opened
        data = memoryview(bytearray(header.descriptor.nbytes))
        with closing(reader):
            try:
                reader.read_into(data)
            except EOFError as error:
                self.mark_corrupt(key, str(error))
                return None
        return header, payloads(header.descriptor, data)

    def late(self) -> None:
        """Let the store rest, because a lookup has waited for it in vain."""
        self._breaker.late()

    def entry(self, key: ChunkKey) -> tuple[Entry | None, Encoding | None]:
        """Return a chunk's entry, and how the chunk is encoded."""
        with self._lock:
            entry = self._index.entries.get(key)
            payload = entry.payload if entry else None
            return entry, payload.blob_encoding if isinstance(payload, StoredPayload) else None

    # Writing.

    def write_if_absent(
        self,
        descriptor: ChunkDescriptor,
        namespace: NamespaceInfo,
        pieces: Sequence[memoryview],
    ) -> bool:
        """Write a blob unless another process has put it there already."""
        if self.shared and all(self._breaker.call(self._backend.contains, [descriptor.key])):
            with self._lock:
                self._enter(BlobHeader(packed_tight(descriptor), namespace))
            return True
        return self.write(descriptor, namespace, pieces)

    def write(
        self,
        descriptor: ChunkDescriptor,
        namespace: NamespaceInfo,
        pieces: Sequence[memoryview],
    ) -> bool:
        """Put a blob, and evict others for it. False when it does not fit.

        Called on ``executor``. Raises BackendError.
        """
        header = BlobHeader(packed_tight(descriptor), namespace)
        put = False
        try:
            self.sweep()
            put = self._put(header, pieces)
        finally:
            with self._lock:
                if put:
                    self._counters["written_chunks_total"] += 1
                    self._counters["written_bytes_total"] += descriptor.nbytes
                    self._enter(header)
                else:
                    self._counters["refused_total"] += 1
        return put

    def _put(self, header: BlobHeader, pieces: Sequence[memoryview]) -> bool:
        descriptor, meta = header.descriptor, header.encode()
        for _ in range(_TRIES):
            if self._breaker.call(self._backend.put, descriptor.key, meta, pieces):
                return True
            if not self._is_findable(header) or not self._evict(descriptor):
                return False
        return False

    def _is_findable(self, header: BlobHeader) -> bool:
        """Whether a chunk's parent is here: if not, no chunk should leave for it."""
        descriptor = header.descriptor
        return descriptor.parent == descriptor.namespace[:KEY_BYTES] or self.contains(
            descriptor.parent
        )

    def _evict(self, descriptor: ChunkDescriptor) -> bool:
        """Evict chunks of as many bytes, or none at all."""
        if self.shared:
            return False

        def may_leave(entry: Entry) -> bool:
            needed = entry.pins or entry.ref_count
            return not needed and entry.key not in (descriptor.key, descriptor.parent)

        with self._lock:
            victims, freed = list[Entry](), 0
            for victim in eviction_order(self._index, may_leave):
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
        self.sweep()
        return True

    def _enter(self, header: BlobHeader) -> None:
        """Enter a blob into the index. Called under the lock.

        Raises ValueError for another shape.
        """
        descriptor, info = header
        payload = StoredPayload([], extents=descriptor.extents, blob_encoding=descriptor.encoding)
        entry = self._index.entries.get(descriptor.key)
        if entry is not None:
            self._index.detach(entry)
            self._index.attach_payload(entry, payload)
            return
        namespace = self._index.namespace_of(info)
        entry = descriptor.new_entry(namespace, payload, self._clock())
        self._index.put(entry)
        self._index.complete(entry)
        if len(self._index.entries) > self.max_entries:
            self._drop_from_index()

    def _drop_from_index(self) -> None:
        """Drop one chunk from the index that stays in the store."""
        victim = next(
            eviction_order(self._index, lambda entry: not entry.pins and not entry.ref_count), None
        )
        if victim is not None:
            self._index.unlink(victim)
            del self._index.pending_deletes[victim.key]

    def mark_corrupt(self, key: ChunkKey, why: str) -> None:
        """Delete a blob that is not what was put there."""
        logger.warning("%s: dropped chunk %s: %s", self.location, key.hex(), why)
        self._counters["corrupt_total"] += 1
        self._drop(key)

    def _drop(self, key: ChunkKey) -> None:
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is not None:
                self._index.unlink(entry)
            self._index.pending_deletes[key] = None
        self.executor.enqueue(self.sweep)

    def sweep(self) -> None:
        """Remove from the store what has left the index. Raises BackendError."""
        with self._lock:
            pending_deletes = list(self._index.pending_deletes)
        if pending_deletes:
            self._breaker.call(self._backend.remove, pending_deletes)
            with self._lock:
                for key in pending_deletes:
                    del self._index.pending_deletes[key]

    def _scan(self) -> None:
        """Enter all blobs of the store into the index, once. Raises BackendError."""
        if self._scanned:
            return

        def scan() -> None:
            begun = self._clock()
            self._limit_pins()
            for number, stored in enumerate(self._backend.scan()):
                if self._closed or number >= self.max_entries:
                    break
                self._enter_scanned(stored)
            logger.info(
                "%s: %d chunks lie there, found in %.1f s",
                self.location,
                len(self._index.entries),
                self._clock() - begun,
            )

        self._breaker.call(scan)
        self._scanned = True

    def _limit_pins(self) -> None:
        """Give pins their share of the store's capacity.

        A shared store is not this tier's to fill, and may be far away: it is not asked.
        """
        if not self.shared:
            capacity = self._backend.usage().capacity_bytes
            if capacity is not None:
                self._pins.budget_bytes = int(capacity * self._max_pinned_share)

    def _enter_scanned(self, stored: BlobRecord) -> None:
        if self.contains(stored.key) or stored.key in self._index.pending_deletes:
            return
        try:
            header = BlobHeader.decode(stored.key, stored.meta, stored.nbytes)
            with self._lock:
                self._enter(header)
        except ValueError as error:
            self.mark_corrupt(stored.key, str(error))

    def replace(self, entry: Entry, header: BlobHeader, pieces: Sequence[memoryview]) -> Transcoded:
        """Replace the blob of an entry that is still linked."""

        def change() -> Transcoded:
            before = entry.nbytes
            with self._lock:
                if not entry.linked:
                    return Transcoded("gone")
                if not self._pins.fits(entry, header.descriptor.nbytes):
                    return Transcoded("failed", OVER_PIN_BUDGET)
            if not self.write(header.descriptor, header.namespace, pieces):
                return Transcoded("failed", "no room for it")
            return Transcoded("done", "", before, header.descriptor.nbytes)

        return self.executor.call(change)
