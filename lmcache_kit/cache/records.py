"""Records that pass between the engine and those who read and write its memory."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from lmcache_kit.keys import ChunkKey

OVER_PIN_BUDGET = "it is pinned, and would not fit into what may be pinned"


class Extent(NamedTuple):
    """Where one rank's payload of a chunk lies, and the xxh3-64 of its bytes."""

    offset: int
    nbytes: int
    checksum: int


class Located(NamedTuple):
    """A stored chunk that a lookup found; leased until released.

    ``start``: position in the sequence. ``usable``: how many of its ``tokens`` match, from its
    first one on. ``extents``: one per rank.
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
    """What a lookup found and leased; ``lease`` is 0 when it found nothing."""

    lease: int
    chunks: tuple[Located, ...]


class Query(NamedTuple):
    """A lookup's packed ``tokens``, in a namespace of this shape."""

    namespace: bytes
    tokens: bytes
    chunk_size: int
    world_size: int


class StoreItem(NamedTuple):
    """A chunk to store: its parent's key, its packed tokens and its rank's payload size.
    ``start``: position of its first token in the sequence."""

    parent: ChunkKey
    tokens: bytes
    nbytes: int
    start: int = 0


class Grant(NamedTuple):
    """Answer to one :class:`StoreItem`. ``ticket`` and ``offset`` mean something if granted."""

    status: Literal["granted", "present", "refused"]
    ticket: int = 0
    offset: int = 0


class Selected(NamedTuple):
    """How much some chunks are. ``tokens`` are those meant, which may be the first of a chunk's."""

    tokens: int = 0
    chunks: int = 0
    nbytes: int = 0


class Transcoded(NamedTuple):
    """What became of a chunk. ``already``: it was so before. ``gone``: it is not here (any more).
    ``failed``: it stays as it was; ``why`` says why. Bytes are of all ranks."""

    status: Literal["done", "already", "gone", "failed"]
    why: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


class StoredChunk(NamedTuple):
    """A chunk that all ranks have stored, as the control plane learns of it."""

    key: ChunkKey
    parent: ChunkKey
    tokens: int
    partial: bool


class ChangeListener(Protocol):
    """Hears of every chunk that becomes complete or goes; called under the engine's lock, so it
    only takes a note."""

    def added(self, chunk: StoredChunk) -> None: ...

    def removed(self, key: ChunkKey) -> None: ...
