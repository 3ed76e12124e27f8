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
from lmcache_kit.cache.tiers.transcoding import pack, unpack
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
            space = self._shelf.spaces.get(query.namespace)
            shape = (query.chunk_size, query.world_size)
            if space is None or (space.chunk_size, space.world_size) != shape:
                return []
            walk = self._shelf.walk(space, query.tokens, start, parent)
            for located, _ in reversed(walk):
                self._shelf.policy.touched(located.key)
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
        """What lies there, its label verified and its bytes not yet; None where there is nothing
        that can be used. The content is the caller's to close. Raises BackendError."""
        if key in self._shelf.doomed:
            return None
        blob = self._breaker.call(self._backend.get, key)
        if blob is None:
            self._drop(key)
            return None
        content = BlobReader(blob, self._breaker)
        try:
            label = BlobHeader.decode(key, blob.meta, content.nbytes)
            with self._lock:
                known = self._shelf.entries.get(key)
                if known is None or known.body.extents != label.parcel.extents:
                    self._learn(label)
        except ValueError as error:
            content.close()
            self.spoilt(key, str(error))
            return None
        with self._lock:
            self._counters["read_chunks_total"] += 1
            self._counters["read_bytes_total"] += label.parcel.nbytes
        return label, content

    def read(self, key: ChunkKey) -> tuple[BlobHeader, list[memoryview]] | None:
        """The same, with the bytes of each rank."""
        opened = self.open(key)
        if opened is None:
            return None
        label, content = opened
        data = memoryview(bytearray(label.parcel.nbytes))
        with closing(content):
            try:
                content.read_into(data)
            except EOFError as error:
                self.spoilt(key, str(error))
                return None
        return label, payloads(label.parcel, data)

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

        return self.turns.do(change)

    def forget(self, keys: Collection[ChunkKey]) -> DeleteResult:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        forgotten = super().forget(keys)
        self.turns.send(self._sweep)
        return forgotten

    def pack(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        return pack(self, key, method, codec)

    def unpack(self, key: ChunkKey, method: str) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier_base.Tier`."""
        return unpack(self, key, method, self._get_codec)

    def entry(self, key: ChunkKey) -> tuple[Entry | None, Encoding | None]:
        """What the index knows of a chunk, and how it is encoded."""
        with self._lock:
            entry = self._shelf.entries.get(key)
            body = entry.body if entry else None
            return entry, body.packing if isinstance(body, StoredPayload) else None

    def replace(self, entry: Entry, label: BlobHeader, pieces: Sequence[memoryview]) -> Transcoded:
        """Put other bytes in the place of an entry's, if they are still those of ``label``."""

        def change() -> Transcoded:
            before = entry.nbytes
            with self._lock:
                if not entry.linked:
                    return Transcoded("gone")
                growth = label.parcel.nbytes - before
                if entry.pins and self._pins.pinned_bytes + growth > self._pins.budget_bytes:
                    return Transcoded("failed", OVER_PIN_BUDGET)
            if not self.write(label.parcel, label.space, pieces):
                return Transcoded("failed", "no room for it")
            return Transcoded("done", "", before, label.parcel.nbytes)

        return self.turns.do(change)
