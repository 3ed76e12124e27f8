"""Records that pass between the engine and its readers, writers and operators."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from lmcache_kit.keys import ChunkKey

OVER_PIN_BUDGET = "it is pinned, and would not fit into what may be pinned"


class Extent(NamedTuple):
    """The place of one rank's payload in memory, and the xxh3-64 of its bytes."""

    offset: int
    nbytes: int
    checksum: int


class Located(NamedTuple):
    """A chunk of a match, leased until the lease ends.

    ``start``: position in the sequence. ``usable``: how many of its first ``tokens`` match.
    ``extents``: one per rank.
    """

    key: ChunkKey
    start: int
    usable: int
    tokens: int
    extents: tuple[Extent, ...]

    @property
    def end(self) -> int:
        return self.start + self.usable


class Match(NamedTuple):
    """The chunks that a lookup found, and their lease; 0 without any."""

    lease: int
    chunks: tuple[Located, ...]


class Query(NamedTuple):
    """A lookup's packed ``tokens``, in a namespace of this shape."""

    namespace: bytes
    tokens: bytes
    chunk_size: int
    world_size: int


class StoreItem(NamedTuple):
    """A chunk to store: its parent's key, its packed tokens and the size of a rank's payload.

    ``start``: position of its first token in the sequence.
    """

    parent: ChunkKey
    tokens: bytes
    nbytes: int
    start: int = 0


class Grant(NamedTuple):
    """The answer to one :class:`StoreItem`. ``ticket`` and ``offset`` are set if granted."""

    status: Literal["granted", "present", "refused"]
    ticket: int = 0
    offset: int = 0


class Selected(NamedTuple):
    """Sums over chunks. ``tokens`` counts the selected ones, which may be the first of a chunk."""

    tokens: int = 0
    chunks: int = 0
    nbytes: int = 0


class Transcoded(NamedTuple):
    """The result of encoding or decoding a chunk, or of moving it.

    ``already``: it was so before. ``gone``: it is not here (any more). ``failed``: it stays as it
    was; ``why`` says why. Bytes are those of all ranks.
    """

    status: Literal["done", "already", "gone", "failed"]
    why: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


class StoredChunk(NamedTuple):
    """A chunk that all ranks have stored, as the control plane records it."""

    key: ChunkKey
    parent: ChunkKey
    tokens: int
    partial: bool


class ChangeListener(Protocol):
    """Receive every chunk that becomes complete, and every one that leaves.

    Called under the engine's lock, so it must only take a note.
    """

    def added(self, chunk: StoredChunk) -> None: ...

    def removed(self, key: ChunkKey) -> None: ...
