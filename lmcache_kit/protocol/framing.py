"""The framing and the decoding that all msgpack wires share.

On a stream socket a frame is a little-endian u32 length followed by that many bytes of msgpack.
On ZMQ, which keeps messages apart by itself, a frame is the msgpack alone. Every defect of a
frame, in its length, its encoding or its type, is a ProtocolError.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import TypeVar

import msgspec

from lmcache_kit.errors import ProtocolError

HEADER = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 20
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises: the last two for text that is not UTF-8 and for deep nesting."""
_M = TypeVar("_M")


def decode(decoder: msgspec.msgpack.Decoder[_M], body: bytes | memoryview, max_bytes: int) -> _M:
    """Decode the body of one frame.

    Raises ProtocolError when it is larger than ``max_bytes`` or is not a message of this type.
    """
    _check_length(len(body), max_bytes)
    try:
        return decoder.decode(body)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed message: {error}") from error


def version_mismatch(theirs: int, ours: int) -> str:
    """Say why a peer of another protocol version is refused; empty when the versions are equal."""
    if theirs == ours:
        return ""
    return (
        f"this side speaks protocol version {ours}, the other side {theirs}: "
        "both must run the same lmcache-kit"
    )


def frame(body: bytes, max_bytes: int) -> bytes:
    """Put the length before a body. Raises ProtocolError when it is larger than ``max_bytes``."""
    _check_length(len(body), max_bytes)
    return HEADER.pack(len(body)) + body


class FrameBuffer:
    """Cuts what a stream socket delivers into the bodies of frames.

    >>> buffer = FrameBuffer()
    >>> buffer.feed(frame(b"one", 10) + frame(b"two", 10)[:5])
    >>> buffer.next_body(10), buffer.next_body(10), len(buffer)
    (b'one', None, 5)
    """

    def __init__(self) -> None:
        self._received = bytearray()

    def __len__(self) -> int:
        """Bytes that are not taken yet."""
        return len(self._received)

    def feed(self, data: bytes) -> None:
        """Append received bytes."""
        self._received += data

    def next_body(self, max_bytes: int) -> bytes | None:
        """Take the body of the next frame; None when it is not complete yet.

        Raises ProtocolError as soon as a header announces more than ``max_bytes``.
        """
        if len(self._received) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._received)
        _check_length(length, max_bytes)
        end = HEADER.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[HEADER.size : end])
        del self._received[:end]
        return body


def send(connection: socket.socket, body: bytes, max_bytes: int, timeout_s: float) -> None:
    """Send one frame on a blocking socket. Raises OSError and ProtocolError."""
    data = frame(body, max_bytes)
    connection.settimeout(timeout_s)
    connection.sendall(data)


def receive(connection: socket.socket, max_bytes: int, timeout_s: float) -> bytes | None:
    """Receive the body of one frame from a blocking socket; None at the end of the stream.

    Raises OSError (TimeoutError when the frame is not complete after ``timeout_s``), and
    ProtocolError for one that is too large or is cut short.
    """
    deadline = time.monotonic() + timeout_s
    header = _receive_exactly(connection, HEADER.size, deadline)
    if header is None:
        return None
    (length,) = HEADER.unpack(header)
    _check_length(length, max_bytes)
    body = _receive_exactly(connection, length, deadline)
    if body is None:
        raise ProtocolError("the stream ended inside a frame")
    return body


def _check_length(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise ProtocolError(f"a frame of {nbytes} bytes is over the {max_bytes} allowed")


def _receive_exactly(connection: socket.socket, nbytes: int, deadline: float) -> bytes | None:
    """Return None when the stream ends before the first byte.

    Memory grows only as bytes arrive, so that a header alone cannot claim it.
    """
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
