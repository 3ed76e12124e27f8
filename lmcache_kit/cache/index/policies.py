"""The kit's own eviction policies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache_kit.interfaces.eviction import EvictionPolicy
from lmcache_kit.keys import ChunkKey


class FIFO(EvictionPolicy):
    """First in, first out: uses do not count."""

    def __init__(self) -> None:
        # An OrderedDict, because a dict scans over the slots of all keys that left its front.
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def added(self, key: ChunkKey) -> None:
        self._order[key] = None

    def touched(self, key: ChunkKey) -> None:
        pass

    def removed(self, key: ChunkKey) -> None:
        del self._order[key]

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)


class LRU(FIFO):
    """Least recently used first."""

    def touched(self, key: ChunkKey) -> None:
        self._order.move_to_end(key)


class LFU(EvictionPolicy):
    """Least frequently used first; of equally frequent ones the least recently used.

    Keeps one queue per count, so every step costs the same however many keys there are (Shah,
    Mitra, Matani: "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010).
    """

    def __init__(self) -> None:
        self._uses: dict[ChunkKey, int] = {}
        self._by_uses: dict[int, OrderedDict[ChunkKey, None]] = {}

    def added(self, key: ChunkKey) -> None:
        self._enter(key, 1)

    def touched(self, key: ChunkKey) -> None:
        self._enter(key, self._leave(key) + 1)

    def removed(self, key: ChunkKey) -> None:
        self._leave(key)

    def victims(self) -> Iterator[ChunkKey]:
        for uses in sorted(self._by_uses):
            yield from self._by_uses[uses]

    def _enter(self, key: ChunkKey, uses: int) -> None:
        self._uses[key] = uses
        self._by_uses.setdefault(uses, OrderedDict())[key] = None

    def _leave(self, key: ChunkKey) -> int:
        uses = self._uses.pop(key)
        queue = self._by_uses[uses]
        del queue[key]
        if not queue:
            del self._by_uses[uses]
        return uses
