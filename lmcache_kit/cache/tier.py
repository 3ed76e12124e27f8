"""A tier below memory: an index of what lies in a store, and what is done to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from lmcache_kit.cache.content import Content
from lmcache_kit.cache.depot import Depot
from lmcache_kit.cache.entries import Entry
from lmcache_kit.cache.labels import Label, payloads
from lmcache_kit.cache.packing import OVER_PIN_BUDGET, Recoded
from lmcache_kit.cache.recoding import pack, unpack
from lmcache_kit.cache.stored import StoredBody
from lmcache_kit.keys import ChunkKey, chain

if TYPE_CHECKING:
    from lmcache_kit.cache.lookups import Query
    from lmcache_kit.cache.parcels import Forgotten, Packing
    from lmcache_kit.cache.records import Selected
    from lmcache_kit.cache.transfers import GetCodec
    from lmcache_kit.interfaces import Backend, Codec, EvictionPolicy


class Tier(Depot):
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

    def open(self, key: ChunkKey) -> tuple[Label, Content] | None:
        """What lies there, its label verified and its bytes not yet; None where there is nothing
        that can be used. The content is the caller's to close. Raises BackendError."""
        if key in self._shelf.doomed:
            return None
        blob = self._breaker.call(self._backend.get, key)
        if blob is None:
            self._drop(key)
            return None
        content = Content(blob, self._breaker)
        try:
            label = Label.decode(key, blob.meta, content.nbytes)
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

    def read(self, key: ChunkKey) -> tuple[Label, list[memoryview]] | None:
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
        """See :class:`~lmcache_kit.cache.inventory.Inventory`. Raises BackendError when the store
        does not let them go: they are forgotten here then, and it is tried again."""

        def change() -> tuple[Selected, Selected]:
            both = super(Tier, self).clear(namespaces, tokens, force=force)
            self._sweep()
            return both

        return self.turns.do(change)

    def forget(self, keys: Collection[ChunkKey]) -> Forgotten:
        """See :class:`~lmcache_kit.cache.inventory.Inventory`."""
        forgotten = super().forget(keys)
        self.turns.send(self._sweep)
        return forgotten

    def pack(self, key: ChunkKey, method: str, codec: Codec) -> Recoded:
        """See :class:`~lmcache_kit.cache.inventory.Inventory`."""
        return pack(self, key, method, codec)

    def unpack(self, key: ChunkKey, method: str) -> Recoded:
        """See :class:`~lmcache_kit.cache.inventory.Inventory`."""
        return unpack(self, key, method, self._get_codec)

    def entry(self, key: ChunkKey) -> tuple[Entry | None, Packing | None]:
        """What the index knows of a chunk, and how it is encoded."""
        with self._lock:
            entry = self._shelf.entries.get(key)
            body = entry.body if entry else None
            return entry, body.packing if isinstance(body, StoredBody) else None

    def replace(self, entry: Entry, label: Label, pieces: Sequence[memoryview]) -> Recoded:
        """Put other bytes in the place of an entry's, if they are still those of ``label``."""

        def change() -> Recoded:
            before = entry.nbytes
            with self._lock:
                if not entry.linked:
                    return Recoded("gone")
                growth = label.parcel.nbytes - before
                if entry.pins and self._pins.pinned_bytes + growth > self._pins.budget_bytes:
                    return Recoded("failed", OVER_PIN_BUDGET)
            if not self.write(label.parcel, label.space, pieces):
                return Recoded("failed", "no room for it")
            return Recoded("done", "", before, label.parcel.nbytes)

        return self.turns.do(change)
