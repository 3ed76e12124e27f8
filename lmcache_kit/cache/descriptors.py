"""Records of chunks that go from one cache to another."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lmcache_kit.cache.index.entries import (
    Entry,
    NamespaceState,
    Payload,
    RankLayout,
    big_endian,
)
from lmcache_kit.cache.records import Extent
from lmcache_kit.interfaces.codec import ChunkInfo, Codec
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES, ChunkKey, chunk_key


class ChunkRef(NamedTuple):
    """A stored chunk, of which the first ``tokens`` are meant.

    ``nbytes``: its size as stored, over all ranks. ``namespace``: a digest.
    """

    key: ChunkKey
    namespace: bytes
    tokens: int
    nbytes: int


class NamespaceInfo(NamedTuple):
    """A namespace that has chunks, with ``(rank, layout)`` of the ranks that declared theirs."""

    digest: bytes
    chunk_size: int
    world_size: int
    rank_layouts: tuple[tuple[int, RankLayout], ...]


class Encoding(NamedTuple):
    """How a chunk's bytes are encoded: the codec's name, the version of its format, and what was
    encoded, one per rank."""

    method: str
    version: int
    chunks: tuple[ChunkInfo, ...]


class ChunkDescriptor(NamedTuple):
    """All that a cache must know of a chunk to take it over.

    ``tokens`` are packed and ``start`` is the position of the first one. ``extents``, one per rank,
    lie in the memory of the sender. ``encoding`` is None for raw bytes.
    """

    key: ChunkKey
    namespace: bytes
    parent: ChunkKey
    tokens: bytes
    start: int
    extents: tuple[Extent, ...]
    encoding: Encoding | None = None

    @property
    def nbytes(self) -> int:
        return sum([extent.nbytes for extent in self.extents])

    def is_sound(self, info: NamespaceInfo) -> bool:
        """Whether the descriptor agrees with its key, in the namespace of ``info``."""
        tokens, rest = divmod(len(self.tokens), TOKEN_BYTES)
        return (
            not rest
            and 1 <= tokens <= info.chunk_size
            and len(self.parent) == KEY_BYTES
            and len(self.extents) == info.world_size
            and all(extent.nbytes > 0 for extent in self.extents)
            and self.key == chunk_key(info.digest, self.parent, self.tokens)
        )

    def new_entry(self, namespace: NamespaceState, payload: Payload, since: float) -> Entry:
        """Return an entry for this chunk, which is in no index yet."""
        sort_key = big_endian(self.tokens)
        return Entry(self.key, self.parent, namespace, sort_key, self.start, payload, since)


class Reservation(NamedTuple):
    """The answer to one descriptor.

    ``granted``: ``ticket`` and ``regions``, one per rank, are set. ``present``: the chunk is stored
    here already. ``storing``: another owner is storing it. ``full``: there is no room. ``unfit``:
    the chunk cannot be kept here; ``why`` says why.
    """

    status: Literal["granted", "present", "storing", "full", "unfit"]
    ticket: int = 0
    regions: tuple[Region, ...] = ()
    codec: Codec | None = None
    why: str = ""


class DeleteResult(NamedTuple):
    """How many chunks were deleted, and how many stay.

    They stay because they are ``pinned``, ``followed`` by other chunks, or ``in_use`` by a move or
    store.
    """

    chunks: int = 0
    pinned: int = 0
    followed: int = 0
    in_use: int = 0
