"""Records of chunks that go from one cache to another."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.records import Extent
from lmcache_kit.interfaces.codec import ChunkInfo, Codec
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.keys import KEY_BYTES, TOKEN_BYTES, ChunkKey, chunk_key


class ChunkRef(NamedTuple):
    """A chunk that is stored, and how many of its first ``tokens`` are meant. ``nbytes`` is what
    it weighs as it is, over all ranks; ``namespace`` a digest."""

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
    """A chunk to take over, all that is to be known of it. ``tokens`` are packed, ``start`` is
    the position of the first one. ``extents``, one per rank, lie in the memory of its holder.
    ``encoding`` is None for raw bytes."""

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
        """Whether it is what its key says, in the namespace of ``info``."""
        tokens, rest = divmod(len(self.tokens), TOKEN_BYTES)
        return (
            not rest
            and 1 <= tokens <= info.chunk_size
            and len(self.parent) == KEY_BYTES
            and len(self.extents) == info.world_size
            and all(extent.nbytes > 0 for extent in self.extents)
            and self.key == chunk_key(info.digest, self.parent, self.tokens)
        )


class Reservation(NamedTuple):
    """Where a descriptor goes. ``present``: it is here already, and stays. ``storing``: somebody
    stores it just now. ``full``: there is no room. ``unfit``: it cannot be kept here, ``why`` says
    why. ``ticket`` and ``regions`` (one per rank) mean something if ``granted``."""

    status: Literal["granted", "present", "storing", "full", "unfit"]
    ticket: int = 0
    regions: tuple[Region, ...] = ()
    codec: Codec | None = None
    why: str = ""


class DeleteResult(NamedTuple):
    """Chunks that a holder forgot, and those that it keeps because they are pinned, because others
    there follow them, or because another move needs them."""

    chunks: int = 0
    pinned: int = 0
    followed: int = 0
    in_use: int = 0
