"""What the engine knows of a chunk, and the index of a chunk's children."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lmcache_kit.cache.records import Extent, StoredChunk
from lmcache_kit.interfaces.codec import ChunkInfo, Rope
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES, ChunkKey
from lmcache_kit.layout import DTYPE_BYTES, KVLayout

if TYPE_CHECKING:
    from lmcache_kit.cache.memory.decoding import Decoding
    from lmcache_kit.interfaces.codec import Codec
    from lmcache_kit.interfaces.memory import Region


class RankLayout(NamedTuple):
    """What one rank's payloads are, as far as a codec must know it."""

    layout: KVLayout
    rope: Rope | None = None
    first_head: int = 0


@dataclass(slots=True, eq=False)
class NamespaceState:
    """A namespace that has chunks here. Its digest fixes the next two, so they must agree.
    ``forms``: by rank, of those that said it."""

    digest: bytes
    chunk_size: int
    world_size: int
    forms: dict[int, RankLayout] = field(default_factory=dict)
    entries: int = 0

    @property
    def root(self) -> ChunkKey:
        return self.digest[:KEY_BYTES]


class ResolvedEncoding(NamedTuple):
    """What made the bytes of a body. ``version``: of the codec's format; ``chunks``: what was
    encoded, one per rank."""

    method: str
    version: int
    codec: Codec
    chunks: tuple[ChunkInfo, ...]


@dataclass(slots=True, eq=False)
class Payload:
    """Bytes of a chunk in memory, one region per rank: raw ones, or those of an ``encoding``.

    ``holds`` counts who reads or writes them, ``kept`` says that they are what a chunk that can
    be found, or is coming to be, consists of. When neither is so, they are freed.
    """

    regions: list[Region]
    encoding: ResolvedEncoding | None = None
    extents: tuple[Extent, ...] = ()
    kept: bool = True
    holds: int = 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of each rank."""
        return [region.nbytes for region in self.regions]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def seal(self, checksums: Sequence[int]) -> None:
        """All is written; ``checksums``, by rank, are the xxh3-64 of it."""
        self.extents = tuple(
            Extent(region.offset, region.nbytes, checksum)
            for region, checksum in zip(self.regions, checksums, strict=True)
        )


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk: pending until every rank has committed its payload, then complete.

    ``order`` is its tokens as big-endian u32, so that bytes sort as tokens do; ``start`` is the
    position of the first one. The body has memory for every rank from the start; ``claimed`` are
    the ranks that write or have written theirs. ``linked`` turns false once, when the chunk is
    evicted, dropped or given up. ``unpacked`` may be a raw copy for readers of an encoded body;
    ``busy`` says that another body is being made to take the place of this one. ``pins`` and
    ``anchors`` count the pins and the moves that keep it.
    """

    key: ChunkKey
    parent: ChunkKey
    space: NamespaceState
    order: bytes
    start: int
    body: Payload
    since: float
    claimed: set[int] = field(default_factory=set)
    checksums: dict[int, int] = field(default_factory=dict)
    pins: int = 0
    anchors: int = 0
    linked: bool = True
    busy: bool = False
    unpacked: Decoding | None = None

    @property
    def tokens(self) -> int:
        return len(self.order) // TOKEN_BYTES

    @property
    def complete(self) -> bool:
        return bool(self.body.extents)

    def seal(self) -> None:
        """Every rank has written its payload."""
        self.body.seal([self.checksums[rank] for rank in range(self.space.world_size)])

    @property
    def nbytes(self) -> int:
        return self.body.nbytes

    @property
    def record(self) -> StoredChunk:
        tokens = self.tokens
        return StoredChunk(self.key, self.parent, tokens, tokens < self.space.chunk_size)

    def chunk_info(self, rank: int) -> ChunkInfo:
        """What a codec must know of a rank's payload. Raises ValueError when that is not known."""
        form = self.space.forms.get(rank)
        if form is None:
            raise ValueError(f"rank {rank} has not said what its payloads are")
        if form.layout.dtype not in DTYPE_BYTES:
            raise ValueError(f"rank {rank} stores {form.layout.dtype!r}, which is not known")
        info = ChunkInfo(form.layout, self.tokens, self.start, form.rope, form.first_head)
        if info.payload_bytes != self.body.sizes[rank]:
            raise ValueError(
                f"rank {rank} stored {self.body.sizes[rank]} bytes, and {info.payload_bytes} are "
                f"{self.tokens} tokens of its layout"
            )
        return info


class PartialChunk(NamedTuple):
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
