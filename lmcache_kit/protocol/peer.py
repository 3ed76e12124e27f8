"""The wire between two cache processes: a TCP stream, perhaps in TLS, of msgpack frames.

A frame is a little-endian u32 length and that many bytes of msgpack. Who dials speaks first, with
:class:`Open` or :class:`Attach`; then each request has one answer. After an :class:`Attach` that
was answered with :class:`Attached` the connection belongs to a transport.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from lmcache_kit.cache.descriptors import ChunkDescriptor, ChunkRef, DeleteResult, NamespaceInfo
from lmcache_kit.errors import ProtocolError
from lmcache_kit.keys import ChunkKey, Namespace
from lmcache_kit.protocol.capability import Capability

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_FIRST_FRAME_BYTES = 8 * 1024 * 1024
MAX_HOLDINGS = 16_384
MAX_LENT = 4096
WINDOW_BYTES = 256 * 1024 * 1024
WINDOW_SHARE = 8
"""What is lent at a time is at most this part of a memory that it has to find room in."""
_HEADER = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 20


# From who takes.


class Open(msgspec.Struct, frozen=True, tag="open"):
    """A move: what is wanted, and the controller's seal on it. ``incarnation``: of the peer that
    is meant; ``namespaces``: the base ones of who takes."""

    version: int
    claim: Capability
    seal: bytes
    incarnation: bytes
    namespaces: tuple[Namespace, ...]


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """This connection is for the transport ``transport``; ``token`` is of a :class:`Welcome`."""

    version: int
    transport: str
    token: bytes


class ListMore(msgspec.Struct, frozen=True, tag="list_more"):
    """Go on with what there is, from number ``start`` on."""

    start: Annotated[int, msgspec.Meta(ge=0)]


class Lend(msgspec.Struct, frozen=True, tag="lend"):
    """Hold these chunks, say all about them, and let ``transport`` read them."""

    keys: Annotated[tuple[ChunkKey, ...], msgspec.Meta(max_length=MAX_LENT)]
    transport: str


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Let ``transport`` read some parcels of a loan, or read them again: their numbers in it, in
    this order, and of each the payloads of all ranks."""

    lease: int
    transport: str
    parcels: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_LENT)]


class Recheck(msgspec.Struct, frozen=True, tag="recheck"):
    """What came of these chunks is not what was stored: look whether it is so there, too, and drop
    those."""

    keys: Annotated[tuple[ChunkKey, ...], msgspec.Meta(max_length=MAX_LENT)]


class GiveBack(msgspec.Struct, frozen=True, tag="give_back"):
    """End a loan, and what was offered of it."""

    lease: int


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """These chunks are ours now, and the controller knows it: delete them if you may."""

    keys: Annotated[tuple[ChunkKey, ...], msgspec.Meta(max_length=MAX_HOLDINGS)]


# From who gives.


class Address(msgspec.Struct, frozen=True):
    """A transport of the peer: what it must be known by, or why it does not work there."""

    transport: str
    address: bytes = b""
    why_not: str = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """What the claim comes to: ``chunks`` in all, of which ``first`` are listed here. ``spaces``
    are theirs; ``namespaces`` the base ones of who gives. ``token`` lets transports attach. No
    more than ``window_bytes`` should be asked for at a time, unless a single chunk is larger."""

    token: bytes
    namespaces: tuple[Namespace, ...]
    spaces: tuple[NamespaceInfo, ...]
    transports: tuple[Address, ...]
    chunks: int
    first: tuple[ChunkRef, ...]
    window_bytes: Annotated[int, msgspec.Meta(ge=0)] = WINDOW_BYTES


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """The next byte is the transport's."""


class Listing(msgspec.Struct, frozen=True, tag="listing"):
    """More of what there is."""

    holdings: tuple[ChunkRef, ...]


class Lent(msgspec.Struct, frozen=True, tag="lent"):
    """Those of the chunks asked for that are still here, and the offer of all of them; ``lease``
    is 0 for none."""

    lease: int
    parcels: tuple[ChunkDescriptor, ...]
    offer: bytes


class Offered(msgspec.Struct, frozen=True, tag="offered"):
    """What the transport's link reads by."""

    offer: bytes


class Done(msgspec.Struct, frozen=True, tag="done"):
    """It is so."""


class HasForgotten(msgspec.Struct, frozen=True, tag="has_forgotten"):
    """What became of the chunks to forget."""

    forgotten: DeleteResult


class No(msgspec.Struct, frozen=True, tag="no"):
    """It cannot be, and why; who said it hangs up."""

    why: str


Question: TypeAlias = Open | Attach | ListMore | Lend | Offer | Recheck | GiveBack | Forget
Answer: TypeAlias = Welcome | Attached | Listing | Lent | Offered | Done | HasForgotten | No
_M = TypeVar("_M")

_encoder = msgspec.msgpack.Encoder()
_questions = msgspec.msgpack.Decoder(Question)
_answers = msgspec.msgpack.Decoder(Answer)


def window_bytes(memory_bytes: int) -> int:
    """The most to lend at a time where memory of this size has to find room for it."""
    return min(WINDOW_BYTES, memory_bytes // WINDOW_SHARE)


def send(connection: socket.socket, message: Question | Answer, timeout_s: float) -> None:
    """One frame. Raises OSError, and ProtocolError for one that is too large."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(body)} bytes is over the {MAX_FRAME_BYTES} allowed")
    connection.settimeout(timeout_s)
    connection.sendall(_HEADER.pack(len(body)) + body)


def receive_question(
    connection: socket.socket, timeout_s: float, *, first: bool = False
) -> Question | None:
    """None at the end of the stream. Raises OSError and ProtocolError."""
    limit = MAX_FIRST_FRAME_BYTES if first else MAX_FRAME_BYTES
    return _receive(connection, _questions, timeout_s, limit)


def receive_answer(connection: socket.socket, timeout_s: float) -> Answer:
    """Raises OSError, also for an end of the stream, and ProtocolError."""
    answer: Answer | None = _receive(connection, _answers, timeout_s, MAX_FRAME_BYTES)
    if answer is None:
        raise ConnectionResetError("it hung up")
    return answer


def _receive(
    connection: socket.socket, decoder: msgspec.msgpack.Decoder[_M], timeout_s: float, limit: int
) -> _M | None:
    deadline = time.monotonic() + timeout_s
    header = _exactly(connection, _HEADER.size, deadline)
    if header is None:
        return None
    (length,) = _HEADER.unpack(header)
    if length > limit:
        raise ProtocolError(f"a frame of {length} bytes is over the {limit} allowed")
    body = _exactly(connection, length, deadline)
    if body is None:
        raise ProtocolError("the stream ended inside a frame")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The last two are what msgspec lets through for bad UTF-8 and for deep nesting.
        raise ProtocolError(f"not a message: {error}") from error


def _exactly(connection: socket.socket, nbytes: int, deadline: float) -> bytes | None:
    """None when the stream ends before the first byte; memory grows only as bytes come."""
    received = bytearray()
    while len(received) < nbytes:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left_s)
        data = connection.recv(min(nbytes - len(received), _RECEIVE_BYTES))
        if not data:
            if received:
                raise ProtocolError("the stream ended inside a frame")
            return None
        received += data
    return bytes(received)
