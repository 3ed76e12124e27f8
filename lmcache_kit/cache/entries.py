"""What the engine knows of a chunk, and the index of a chunk's children."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_kit.cache.records import Extent, StoredChunk
from lmcache_kit.interfaces.backend import Region
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES, ChunkKey


@dataclass(slots=True, eq=False)
class Space:
    """A namespace that has chunks here. Its digest fixes the other two, so they must agree."""

    digest: bytes
    chunk_size: int
    world_size: int
    entries: int = 0

    @property
    def root(self) -> ChunkKey:
        return self.digest[:KEY_BYTES]


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk: pending until every rank has committed its payload, then complete.

    ``order`` is its tokens as big-endian u32, so that bytes sort as tokens do. ``regions`` holds
    memory for every rank from the start, ``claimed`` the ranks that write or have written theirs;
    ``extents`` and ``nbytes``, over all ranks, are set when it is complete. ``linked`` turns false
    once, when it is evicted, dropped or given up; the memory of an entry that is not linked is
    freed when nobody uses it any more.
    """

    key: ChunkKey
    parent: ChunkKey
    space: Space
    order: bytes
    regions: list[Region]
    since: float
    claimed: set[int] = field(default_factory=set)
    checksums: dict[int, int] = field(default_factory=dict)
    extents: tuple[Extent, ...] = ()
    nbytes: int = 0
    writers: int = 0
    leases: int = 0
    pins: int = 0
    linked: bool = True

    @property
    def tokens(self) -> int:
        return len(self.order) // TOKEN_BYTES

    @property
    def complete(self) -> bool:
        return bool(self.extents)

    @property
    def in_use(self) -> bool:
        return bool(self.leases or self.writers)

    @property
    def record(self) -> StoredChunk:
        tokens = self.tokens
        return StoredChunk(self.key, self.parent, tokens, tokens < self.space.chunk_size)

    def seal(self) -> None:
        """Become complete: every rank has committed."""
        self.extents = tuple(
            Extent(region.offset, region.nbytes, self.checksums[rank])
            for rank, region in enumerate(self.regions)
        )
        self.nbytes = sum(region.nbytes for region in self.regions)


class Part(NamedTuple):
    """A chunk, and how many of its first tokens somebody means."""

    entry: Entry
    tokens: int


class Children:
    """The complete chunks that follow one parent, sorted by their tokens."""

    __slots__ = ("_entries", "_orders")

    def __init__(self) -> None:
        self._orders: list[bytes] = []
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._orders)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        at = bisect_left(self._orders, entry.order)
        self._orders.insert(at, entry.order)
        self._entries.insert(at, entry)

    def remove(self, entry: Entry) -> None:
        at = bisect_left(self._orders, entry.order)
        del self._orders[at], self._entries[at]

    def longest(self, order: bytes) -> tuple[Entry, int]:
        """The child that has most first tokens in common with ``order``, and how many.

        In sorted order the longest common prefix is always one with a neighbour.
        """
        at = bisect_left(self._orders, order)
        if at < len(self._orders) and self._orders[at] == order:
            return self._entries[at], len(order) // TOKEN_BYTES
        best, most = -1, -1
        for near in (at - 1, at):
            if 0 <= near < len(self._orders):
                common = common_tokens(self._orders[near], order)
                if common > most:
                    best, most = near, common
        return self._entries[best], most


def big_endian(tokens: bytes) -> bytes:
    """Packed tokens with the bytes of each turned round."""
    words = array("I", tokens)
    if words.itemsize != TOKEN_BYTES:
        raise RuntimeError(f"unsigned int has {words.itemsize} bytes on this platform, not 4")
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """How many first tokens two big-endian sequences share."""
    size = min(len(a), len(b))
    differing = int.from_bytes(a[:size], "big") ^ int.from_bytes(b[:size], "big")
    return (size - (differing.bit_length() + 7) // 8) // TOKEN_BYTES
