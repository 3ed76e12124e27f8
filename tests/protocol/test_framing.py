"""Frames on stream sockets, and the decoding that all wires share."""

from __future__ import annotations

import contextlib
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_kit.errors import ProtocolError
from lmcache_kit.protocol import framing
from lmcache_kit.protocol.framing import HEADER, FrameBuffer, frame

LIMIT = 1000
WAIT_S = 20.0


class Named(msgspec.Struct):
    name: str


@given(bodies=st.lists(st.binary(max_size=50), max_size=5), step=st.integers(1, 60))
def test_a_buffer_returns_the_bodies_however_the_stream_is_cut(
    bodies: list[bytes], step: int
) -> None:
    stream = b"".join(frame(body, LIMIT) for body in bodies)
    buffer, found = FrameBuffer(), list[bytes]()
    for at in range(0, len(stream), step):
        buffer.feed(stream[at : at + step])
        while (body := buffer.next_body(LIMIT)) is not None:
            found.append(body)
    assert found == bodies
    assert not buffer


@given(bodies=st.lists(st.binary(max_size=LIMIT), max_size=3))
def test_what_is_sent_is_received_until_the_end_of_the_stream(bodies: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            for body in bodies:
                framing.send(ours, body, LIMIT, WAIT_S)
        assert [framing.receive(theirs, LIMIT, WAIT_S) for _ in bodies] == bodies
        assert framing.receive(theirs, LIMIT, WAIT_S) is None


def test_a_frame_over_the_limit_is_refused_by_its_header() -> None:
    header = HEADER.pack(LIMIT + 1)
    buffer = FrameBuffer()
    buffer.feed(header)
    with pytest.raises(ProtocolError, match="1001 bytes is over the 1000 allowed"):
        buffer.next_body(LIMIT)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(header)
        with pytest.raises(ProtocolError, match="over the 1000 allowed"):
            framing.receive(theirs, LIMIT, WAIT_S)
        with pytest.raises(ProtocolError, match="over the 1000 allowed"):
            framing.send(theirs, bytes(LIMIT + 1), LIMIT, WAIT_S)


@pytest.mark.parametrize("cut", [1, 3, 4, 7])
def test_a_stream_that_ends_inside_a_frame_is_an_error(cut: int) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(frame(b"body", LIMIT)[:cut])
        with pytest.raises(ProtocolError, match="ended inside a frame"):
            framing.receive(theirs, LIMIT, WAIT_S)


def test_a_frame_that_does_not_arrive_in_time_is_a_timeout() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(b"body", LIMIT)[:6])
        with pytest.raises(TimeoutError):
            framing.receive(theirs, LIMIT, 0.05)


@given(body=st.binary(max_size=100))
def test_bytes_of_any_kind_decode_or_are_a_protocol_error(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        framing.decode(msgspec.msgpack.Decoder(Named), body, LIMIT)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x81\xa4name\x01",
        b"\x81\xa4name\xa2\xff\xff",
        b"\x81\xa1x" + b"\x91" * 60_000,
    ],
    ids=["empty", "reserved byte", "wrong type", "bad UTF-8", "deep nesting"],
)
def test_every_defect_of_a_message_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed message"):
        framing.decode(msgspec.msgpack.Decoder(Named), body, 1 << 20)


def test_a_version_that_differs_is_named() -> None:
    assert framing.version_mismatch(3, 3) == ""
    assert "version 3, the other side 4" in framing.version_mismatch(4, 3)
