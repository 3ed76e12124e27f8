"""The wire between a client and the cache process: a Unix stream socket, msgpack frames.

A frame is a little-endian u32 length and that many bytes of msgpack: ``[id, message]``. A client
sends requests, each with an id of its own; the server answers each with one frame of the same id.
The first request is :class:`Hello`; its answer carries the memory's file descriptor (SCM_RIGHTS).
A client that gave up on an answer skips it by its id, and gives back what it granted.

Nothing of KV travels here: workers read and write the shared memory at the offsets named.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal, TypeAlias

import msgspec

from lmcache_kit.cache.records import Grant, Located, StoreItem
from lmcache_kit.errors import ProtocolError
from lmcache_kit.interfaces.codec import Rope
from lmcache_kit.keys import ChunkKey, Namespace
from lmcache_kit.layout import KVLayout

VERSION = 2
MAX_WAIT_S = 60.0
MAX_FRAME_BYTES = 16 * 1024 * 1024
HEADER = struct.Struct("<I")


# Requests.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Who is there. A worker says its rank and the base namespace that it stores under, and what
    its payloads are: their layout, the rotation in K, and its first KV head in the whole model.

    ``settings``: digest of the settings that the client would start a cache process with; empty
    when it takes any. A spawned process that nobody else uses ends when they are not its own.
    """

    version: int
    role: Literal["scheduler", "worker", "tool"]
    instance_id: str
    pid: int
    rank: Annotated[int, msgspec.Meta(ge=0)] = 0
    world_size: Annotated[int, msgspec.Meta(ge=1)] = 1
    namespace: Namespace | None = None
    settings: str = ""
    layout: KVLayout | None = None
    rope: Rope | None = None
    first_head: Annotated[int, msgspec.Meta(ge=0)] = 0


class Lookup(msgspec.Struct, frozen=True, tag="lookup"):
    """Find the longest stored prefix of packed ``tokens`` and lease it.

    ``namespace`` is a digest. The lease ends when each of ``world_size`` ranks has released it,
    when the client's connection ends, or after its time to live. What is not decoded within
    ``wait_s`` ends the prefix.
    """

    namespace: bytes
    chunk_size: int
    tokens: bytes
    world_size: int = 1
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_S)] = 0.0


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Ask for memory for one rank's payloads of some chunks."""

    namespace: bytes
    rank: int
    world_size: int
    chunk_size: int
    items: tuple[StoreItem, ...]


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The payloads of these tickets are written: ``(ticket, xxh3-64)`` pairs."""

    written: tuple[tuple[int, int], ...]


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """These tickets will not be written."""

    tickets: tuple[int, ...]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """One rank is done with a lease; ``rank=None`` ends it for all."""

    lease: int
    rank: int | None = None


class ReportCorrupt(msgspec.Struct, frozen=True, tag="corrupt"):
    """A chunk's bytes did not match its checksum: drop it."""

    key: ChunkKey


class GetStats(msgspec.Struct, frozen=True, tag="stats"):
    """Ask for :class:`Stats`."""


# Answers.


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """``incarnation`` names this life of the cache process, as hex."""

    incarnation: str
    location: str
    memory_bytes: int
    pid: int


class Found(msgspec.Struct, frozen=True, tag="found"):
    """``lease`` is 0 when nothing was found."""

    lease: int
    incarnation: str
    chunks: tuple[Located, ...]

    @property
    def tokens(self) -> int:
        """Length of the stored prefix."""
        return self.chunks[-1].end if self.chunks else 0


class Allocated(msgspec.Struct, frozen=True, tag="allocated"):
    """One grant per item, in order."""

    grants: tuple[Grant, ...]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """``count``: how many of what was named took effect."""

    count: int = 0


class Stats(msgspec.Struct, frozen=True, tag="stats_answer"):
    """``values``: gauges, and counters whose names end in ``_total``."""

    instance_id: str
    incarnation: str
    pid: int
    location: str
    values: dict[str, float]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request could not be served; the connection stays usable."""

    message: str


Request: TypeAlias = (
    Hello | Lookup | Allocate | Commit | Abandon | Release | ReportCorrupt | GetStats
)
Answer: TypeAlias = Welcome | Found | Allocated | Done | Stats | Failed

# msgspec lets the last two through, for bad UTF-8 and for nesting without end.
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(tuple[int, Request])
_answers = msgspec.msgpack.Decoder(tuple[int, Answer])


def encode(request_id: int, message: Request | Answer) -> bytes:
    """A whole frame. Raises ProtocolError for one that is too large."""
    body = _encoder.encode((request_id, message))
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(body)} bytes is over the {MAX_FRAME_BYTES} allowed")
    return HEADER.pack(len(body)) + body


def decode_request(body: bytes | memoryview) -> tuple[int, Request]:
    """Raises ProtocolError for anything but a request."""
    try:
        return _requests.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a request: {error}") from error


def decode_answer(body: bytes | memoryview) -> tuple[int, Answer]:
    """Raises ProtocolError for anything but an answer."""
    try:
        return _answers.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not an answer: {error}") from error


def body_length(header: bytes) -> int:
    """Length that a frame's header announces. Raises ProtocolError when it is too large."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes is over the {MAX_FRAME_BYTES} allowed")
    return int(length)
