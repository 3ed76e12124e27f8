"""The wire between a client and the cache process: a Unix stream socket, msgpack frames.

The body of a frame is ``[id, message]``. A client numbers its requests; the server answers each
with one frame of the same id, lookups perhaps later than what was asked after them.

    Hello -> Welcome          once, first; the answer carries the memory's descriptor (SCM_RIGHTS)
    Lookup -> Found           lease the longest stored prefix; then read it from memory
    Allocate -> Allocated     reserve memory; then write KV there
    Commit, Abandon, Release, ReportCorrupt, UseNamespace -> Done
    GetStats -> Stats

A client that gave up on an answer recognises it by its id when it comes, and releases what it
granted. KV does not travel here: workers read and write the memory at the offsets named.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from lmcache_kit.cache.records import Grant, Located, StoreItem
from lmcache_kit.interfaces.codec import Rope
from lmcache_kit.keys import ChunkKey, Namespace
from lmcache_kit.layout import KVLayout
from lmcache_kit.protocol import framing

VERSION = 3
MAX_WAIT_S = 60.0
MAX_FRAME_BYTES = 16 * 1024 * 1024


# Requests.


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Introduce a client.

    A scheduler adds the base namespace that its engine stores under. A worker adds its rank and the
    layout of its payloads: their tensors, the rotary embedding in K, and its first KV head in the
    whole model.

    ``settings`` is a digest of the settings that the client would start a cache process with;
    empty when it accepts any. A spawned process without other clients ends when its own differ.
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
    """Reserve memory for one rank's payloads of some chunks."""

    namespace: bytes
    rank: int
    world_size: int
    chunk_size: int
    items: tuple[StoreItem, ...]


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Publish the payloads of these ``(ticket, xxh3-64)`` pairs, which are written."""

    written: tuple[tuple[int, int], ...]


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Give up the payloads of these tickets, which will not be written."""

    tickets: tuple[int, ...]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """End one rank's part of a lease; ``rank=None`` ends the whole lease."""

    lease: int
    rank: int | None = None


class ReportCorrupt(msgspec.Struct, frozen=True, tag="corrupt"):
    """Drop a chunk whose bytes did not match its checksum."""

    key: ChunkKey


class UseNamespace(msgspec.Struct, frozen=True, tag="use_namespace"):
    """Store under another base namespace from now on."""

    namespace: Namespace


class GetStats(msgspec.Struct, frozen=True, tag="stats"):
    """Request :class:`Stats`."""


# Answers.


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The client is accepted; ``incarnation`` names this life of the cache process, as hex."""

    incarnation: str
    location: str
    memory_bytes: int
    pid: int


class Found(msgspec.Struct, frozen=True, tag="found"):
    """The chunks of a prefix, and their lease: 0 when nothing was found."""

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
    """The request took effect on ``count`` of the things that it named."""

    count: int = 0


class Stats(msgspec.Struct, frozen=True, tag="stats_answer"):
    """Metrics by name: gauges, and counters whose names end in ``_total``.

    ``values`` are those of the cache process and of its memory tier at ``location``;
    ``lower_tiers`` has those of each tier below, by location. ``namespaces`` are the base
    namespaces that clients use.
    """

    instance_id: str
    incarnation: str
    pid: int
    location: str
    values: dict[str, float]
    lower_tiers: dict[str, dict[str, float]]
    namespaces: tuple[Namespace, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request could not be served; the connection stays usable."""

    message: str


Request: TypeAlias = (
    Hello | Lookup | Allocate | Commit | Abandon | Release | ReportCorrupt | UseNamespace | GetStats
)
Answer: TypeAlias = Welcome | Found | Allocated | Done | Stats | Failed

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(tuple[int, Request])
_answers = msgspec.msgpack.Decoder(tuple[int, Answer])


def encode(request_id: int, message: Request | Answer) -> bytes:
    """Encode a message as a whole frame. Raises ProtocolError for one that is too large."""
    return framing.frame(_encoder.encode((request_id, message)), MAX_FRAME_BYTES)


def decode_request(body: bytes | memoryview) -> tuple[int, Request]:
    """Decode the body of a client's frame. Raises ProtocolError for anything but a request."""
    return framing.decode(_requests, body, MAX_FRAME_BYTES)


def decode_answer(body: bytes | memoryview) -> tuple[int, Answer]:
    """Decode the body of a server's frame. Raises ProtocolError for anything but an answer."""
    return framing.decode(_answers, body, MAX_FRAME_BYTES)
