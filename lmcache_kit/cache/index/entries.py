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
    ``rank_layouts``: by rank, of those that said it."""

    digest: bytes
    chunk_size: int
    world_size: int
    rank_layouts: dict[int, RankLayout] = field(default_factory=dict)
    entries: int = 0

    @property
    def root(self) -> ChunkKey:
        return self.digest[:KEY_BYTES]


class ResolvedEncoding(NamedTuple):
    """What made the bytes of a payload. ``version``: of the codec's format; ``chunks``: what was
    encoded, one per rank."""

    method: str
    version: int
    codec: Codec
    chunks: tuple[ChunkInfo, ...]


@dataclass(slots=True, eq=False)
class Payload:
    """Bytes of a chunk in memory, one region per rank: raw ones, or those of an ``encoding``.

    ``ref_count``: how many readers and writers use them. ``attached``: an entry consists of them.
    They are freed when neither holds.
    """

    regions: list[Region]
    encoding: ResolvedEncoding | None = None
    extents: tuple[Extent, ...] = ()
    attached: bool = True
    ref_count: int = 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of each rank."""
        return [region.nbytes for region in self.regions]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def set_checksums(self, checksums: Sequence[int]) -> None:
        """All is written; ``checksums``, by rank, are the xxh3-64 of it."""
        self.extents = tuple(
            Extent(region.offset, region.nbytes, checksum)
            for region, checksum in zip(self.regions, checksums, strict=True)
        )


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk: pending until every rank has committed its payload, then complete.

    ``sort_key`` is its tokens as big-endian u32, so that bytes sort as tokens do; ``start`` is the
    position of the first one. The payload has memory for every rank from the start; ``claimed`` are
    the ranks that write or have written theirs. ``linked`` turns false once, when the chunk is
    evicted, dropped or given up. ``decoding`` may be a raw copy for readers of an encoded payload;
    ``busy`` says that another payload is being made to take the place of this one. ``pins`` and
    ``ref_count`` count the pins and the moves that keep it.
    """

    key: ChunkKey
    parent: ChunkKey
    namespace: NamespaceState
    sort_key: bytes
    start: int
    payload: Payload
    since: float
    claimed: set[int] = field(default_factory=set)
    checksums: dict[int, int] = field(default_factory=dict)
    pins: int = 0
    ref_count: int = 0
    linked: bool = True
    busy: bool = False
    decoding: Decoding | None = None

    @property
    def tokens(self) -> int:
        return len(self.sort_key) // TOKEN_BYTES

    @property
    def complete(self) -> bool:
        return bool(self.payload.extents)

    def mark_complete(self) -> None:
        """Every rank has written its payload."""
        self.payload.set_checksums(
            [self.checksums[rank] for rank in range(self.namespace.world_size)]
        )

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes

    @property
    def record(self) -> StoredChunk:
        tokens = self.tokens
        return StoredChunk(self.key, self.parent, tokens, tokens < self.namespace.chunk_size)

    def chunk_info(self, rank: int) -> ChunkInfo:
        """What a codec must know of a rank's payload. Raises ValueError when that is not known."""
        rank_layout = self.namespace.rank_layouts.get(rank)
        if rank_layout is None:
            raise ValueError(f"rank {rank} has not said what its payloads are")
        if rank_layout.layout.dtype not in DTYPE_BYTES:
            raise ValueError(f"rank {rank} stores {rank_layout.layout.dtype!r}, which is not known")
        info = ChunkInfo(
            rank_layout.layout, self.tokens, self.start, rank_layout.rope, rank_layout.first_head
        )
        if info.payload_bytes != self.payload.sizes[rank]:
            raise ValueError(
                f"rank {rank} stored {self.payload.sizes[rank]} bytes, and {info.payload_bytes} "
                f"are {self.tokens} tokens of its layout"
            )
        return info


class PartialChunk(NamedTuple):
    """A chunk, and how many of its first tokens somebody means."""

    entry: Entry
    tokens: int


class Children:
    """The complete chunks that follow one parent, sorted by their tokens."""

    __slots__ = ("_entries", "_sort_keys")

    def __init__(self) -> None:
        self._sort_keys: list[bytes] = []
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._sort_keys)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        at = bisect_left(self._sort_keys, entry.sort_key)
        self._sort_keys.insert(at, entry.sort_key)
        self._entries.insert(at, entry)

    def remove(self, entry: Entry) -> None:
        at = bisect_left(self._sort_keys, entry.sort_key)
        del self._sort_keys[at], self._entries[at]

    def longest(self, sort_key: bytes) -> tuple[Entry, int]:
        """The child that has most first tokens in common with ``sort_key``, and how many.

        In sorted order the longest common prefix is always one with a neighbour.
        """
        at = bisect_left(self._sort_keys, sort_key)
        if at < len(self._sort_keys) and self._sort_keys[at] == sort_key:
            return self._entries[at], len(sort_key) // TOKEN_BYTES
        best, most = -1, -1
        for near in (at - 1, at):
            if 0 <= near < len(self._sort_keys):
                common = common_tokens(self._sort_keys[near], sort_key)
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
