"""A tier below memory: an index of what lies in a store, and what is done to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from lmcache_kit.cache.index.entries import Entry
from lmcache_kit.cache.memory.transcoding import OVER_PIN_BUDGET, Transcoded
from lmcache_kit.cache.tiers.blob_header import BlobHeader, payloads
from lmcache_kit.cache.tiers.blob_reader import BlobReader
from lmcache_kit.cache.tiers.store_base import StoreTierBase
from lmcache_kit.cache.tiers.store_index import StoredPayload
from lmcache_kit.cache.tiers.transcoding import decode_stored, encode_stored
from lmcache_kit.keys import ChunkKey, chain

if TYPE_CHECKING:
    from lmcache_kit.cache.descriptors import DeleteResult, Encoding
    from lmcache_kit.cache.lookup import Query
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.cache.records import Selected
    from lmcache_kit.interfaces import Backend, Codec, EvictionPolicy


class StoreTier(StoreTierBase):
    """The chunks in ``backend``, which it takes over and closes. ``get_codec``: for what is
    encoded there. Thread-safe."""

    def __init__(
        self,
        backend: Backend,
        policy: EvictionPolicy,
        *,
        location: str,
        get_codec: GetCodec,
        max_pinned_share: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(backend, policy, location, max_pinned_share, clock)
        self._get_codec = get_codec

    # Reading.

    def reach(self, query: Query, start: int, parent: ChunkKey) -> list[tuple[ChunkKey, int]]:
        """Chunks here that go on with the tokens from number ``start`` on, which follows the chunk
        ``parent``: each with how many of its tokens agree."""
        with self._lock:
            namespace = self._index.namespaces.get(query.namespace)
            shape = (query.chunk_size, query.world_size)
            if namespace is None or (namespace.chunk_size, namespace.world_size) != shape:
                return []
            walk = self._index.walk(namespace, query.tokens, start, parent)
            for located, _ in reversed(walk):
                self._index.policy.touched(located.key)
            return [(located.key, located.usable) for located, _ in walk]

    def ask(self, query: Query, start: int, parent: ChunkKey) -> list[tuple[ChunkKey, int]]:
        """The same by asking the store, and for whole chunks only. Raises BackendError."""
        links = list(
            chain(query.namespace, query.tokens, query.chunk_size, start=start, parent=parent)
        )
        there = self._breaker.call(self._backend.contains, [link.key for link in links])
        missing = there.index(False) if False in there else len(links)
        return [(link.key, link.end - link.start) for link in links[:missing]]

    def open(self, key: ChunkKey) -> tuple[BlobHeader, BlobReader] | None:
        """What lies there, its header verified and its bytes not yet; None where there is nothing
        that can be used. The reader is the caller's to close. Raises BackendError."""
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
                    self._learn(header)
        except ValueError as error:
            reader.close()
            self.mark_corrupt(key, str(error))
            return None
        with self._lock:
            self._counters["read_chunks_total"] += 1
            self._counters["read_bytes_total"] += header.descriptor.nbytes
        return header, reader

    def read(self, key: ChunkKey) -> tuple[BlobHeader, list[memoryview]] | None:
        """The same, with the bytes of each rank."""
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
        """It has kept a lookup waiting in vain: leave it alone for a while."""
        self._breaker.late()

    # What operators ask for. Each of these may wait for the store.

    def clear(
        self,
        namespaces: Collection[bytes] | None = None,
        tokens: bytes | None = None,
        *,
        force: bool = False,
    ) -> tuple[Selected, Selected]:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`. Raises BackendError when the store
        does not let them go: they are forgotten here then, and it is tried again."""

        def change() -> tuple[Selected, Selected]:
            both = super(StoreTier, self).clear(namespaces, tokens, force=force)
            self._sweep()
            return both

        return self.executor.call(change)

    def delete(self, keys: Collection[ChunkKey]) -> DeleteResult:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        deleted = super().delete(keys)
        self.executor.enqueue(self._sweep)
        return deleted

    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        return encode_stored(self, key, method, codec)

    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        return decode_stored(self, key, method, self._get_codec)

    def entry(self, key: ChunkKey) -> tuple[Entry | None, Encoding | None]:
        """What the index knows of a chunk, and how it is encoded."""
        with self._lock:
            entry = self._index.entries.get(key)
            payload = entry.payload if entry else None
            return entry, payload.blob_encoding if isinstance(payload, StoredPayload) else None

    def replace(self, entry: Entry, header: BlobHeader, pieces: Sequence[memoryview]) -> Transcoded:
        """Put other bytes in the place of an entry's, if they are still those of ``header``."""

        def change() -> Transcoded:
            before = entry.nbytes
            with self._lock:
                if not entry.linked:
                    return Transcoded("gone")
                growth = header.descriptor.nbytes - before
                if entry.pins and self._pins.pinned_bytes + growth > self._pins.budget_bytes:
                    return Transcoded("failed", OVER_PIN_BUDGET)
            if not self.write(header.descriptor, header.namespace, pieces):
                return Transcoded("failed", "no room for it")
            return Transcoded("done", "", before, header.descriptor.nbytes)

        return self.executor.call(change)
