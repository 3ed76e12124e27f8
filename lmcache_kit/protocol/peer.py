"""The wire between two cache processes: a TCP stream, perhaps in TLS, of msgpack frames.

The destination of a move dials the source and sends requests; each request has one answer.

    Open -> Welcome           the capability of one move, and the chunks that it covers
    ListChunks -> Listing     the rest of these chunks, page by page
    Lease -> Leased           hold some of them, describe them and offer them to a transport
    ReadOffer -> Offered      offer chunks of a lease again
    Verify -> Done            compare chunks with their checksums, drop corrupt ones
    Release -> Done           end a lease and its offers
    Delete -> Deleted         the destination has the chunks and the controller knows it

A connection that begins with :class:`Attach` belongs to a transport once it is answered with
:class:`Attached`. A request that cannot be served is answered with :class:`Refused`, and the
source hangs up.
"""

from __future__ import annotations

import socket
from typing import Annotated, TypeAlias

import msgspec

from lmcache_kit.cache.descriptors import ChunkDescriptor, ChunkRef, DeleteResult, NamespaceInfo
from lmcache_kit.keys import ChunkKey, Namespace
from lmcache_kit.protocol import framing
from lmcache_kit.protocol.capability import Capability

VERSION = 2
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_FIRST_FRAME_BYTES = 8 * 1024 * 1024
MAX_LISTED = 16_384
"""The most chunks in one :class:`Listing` and in one :class:`Delete`."""
MAX_LEASED = 4096
WINDOW_BYTES = 256 * 1024 * 1024
WINDOW_SHARE = 8
"""At most this part of a memory is leased at a time where the chunks have to find room in it."""


# Requests of the destination.


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Begin one move.

    ``signature`` is the controller's of ``capability``. ``incarnation`` names the life of the
    source that is meant. ``namespaces`` are the base namespaces of the destination.
    """

    version: int
    capability: Capability
    signature: bytes
    incarnation: bytes
    namespaces: tuple[Namespace, ...]


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Hand this connection to a transport; ``token`` is the one of a :class:`Welcome`."""

    version: int
    transport: str
    token: bytes


class ListChunks(msgspec.Struct, frozen=True, tag="list_chunks"):
    """List the chunks that the capability covers, from number ``start`` on."""

    start: Annotated[int, msgspec.Meta(ge=0)]


class Lease(msgspec.Struct, frozen=True, tag="lease"):
    """Lease these chunks, describe them, and offer them to ``transport``."""

    keys: Annotated[tuple[ChunkKey, ...], msgspec.Meta(max_length=MAX_LEASED)]
    transport: str


class ReadOffer(msgspec.Struct, frozen=True, tag="read_offer"):
    """Offer chunks of a lease to ``transport``, perhaps again.

    ``chunks`` are their numbers in the lease. All ranks' payloads of each are offered, in order.
    """

    lease: int
    transport: str
    chunks: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_LEASED)]


class Verify(msgspec.Struct, frozen=True, tag="verify"):
    """Compare these chunks with their checksums and drop corrupt ones, because the bytes that
    arrived did not match."""

    keys: Annotated[tuple[ChunkKey, ...], msgspec.Meta(max_length=MAX_LEASED)]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """End a lease and all offers of it."""

    lease: int


class Delete(msgspec.Struct, frozen=True, tag="delete"):
    """Delete these chunks unless something at the source needs them."""

    keys: Annotated[tuple[ChunkKey, ...], msgspec.Meta(max_length=MAX_LISTED)]


# Answers of the source.


class Address(msgspec.Struct, frozen=True):
    """The address of one of the source's transports, or the reason why it cannot be used."""

    transport: str
    address: bytes = b""
    unusable: str = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The chunks that the capability covers: ``chunks`` in number, ``first`` is the first page.

    ``token`` lets transports attach. ``base_namespaces`` are those of the source's workers,
    ``namespaces`` describes those of the chunks. The destination should lease no more than
    ``window_bytes`` at a time, unless a single chunk is larger.
    """

    token: bytes
    base_namespaces: tuple[Namespace, ...]
    namespaces: tuple[NamespaceInfo, ...]
    transports: tuple[Address, ...]
    chunks: int
    first: tuple[ChunkRef, ...]
    window_bytes: Annotated[int, msgspec.Meta(ge=0)] = WINDOW_BYTES


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """The next byte on this connection is the transport's."""


class Listing(msgspec.Struct, frozen=True, tag="listing"):
    """One page of chunks."""

    chunks: tuple[ChunkRef, ...]


class Leased(msgspec.Struct, frozen=True, tag="leased"):
    """Those of the chunks that are still stored, and the offer of all of them.

    ``lease`` is 0 when none is.
    """

    lease: int
    descriptors: tuple[ChunkDescriptor, ...]
    offer: bytes


class Offered(msgspec.Struct, frozen=True, tag="offered"):
    """The bytes that the destination's link reads with."""

    offer: bytes


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The request was carried out."""


class Deleted(msgspec.Struct, frozen=True, tag="deleted"):
    """How many chunks were deleted, and how many stay."""

    result: DeleteResult


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request was not carried out; the source closes the connection."""

    reason: str


Request: TypeAlias = Open | Attach | ListChunks | Lease | ReadOffer | Verify | Release | Delete
Answer: TypeAlias = Welcome | Attached | Listing | Leased | Offered | Done | Deleted | Refused

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)


def window_bytes(memory_bytes: int) -> int:
    """Return how much to lease at a time when it has to find room in a memory of this size."""
    return min(WINDOW_BYTES, memory_bytes // WINDOW_SHARE)


def send(connection: socket.socket, message: Request | Answer, timeout_s: float) -> None:
    """Send one message. Raises OSError, and ProtocolError for one that is too large."""
    framing.send(connection, _encoder.encode(message), MAX_FRAME_BYTES, timeout_s)


def receive_request(
    connection: socket.socket, timeout_s: float, *, first: bool = False
) -> Request | None:
    """Receive one request; None at the end of the stream. Raises OSError and ProtocolError.

    The ``first`` request of a connection may be only half as large, since its sender has not
    shown a capability.
    """
    max_bytes = MAX_FIRST_FRAME_BYTES if first else MAX_FRAME_BYTES
    body = framing.receive(connection, max_bytes, timeout_s)
    return None if body is None else framing.decode(_requests, body, max_bytes)


def receive_answer(connection: socket.socket, timeout_s: float) -> Answer:
    """Receive one answer. Raises ProtocolError, and OSError also at the end of the stream."""
    body = framing.receive(connection, MAX_FRAME_BYTES, timeout_s)
    if body is None:
        raise ConnectionResetError("the connection was closed")
    answer: Answer = framing.decode(_answers, body, MAX_FRAME_BYTES)
    return answer
