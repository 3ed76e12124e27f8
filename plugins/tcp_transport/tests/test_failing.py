"""What goes wrong, and what must not go wrong with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmcache_kit_tcp_transport import serving, wire
from lmcache_kit_tcp_transport.connection import Connection
from lmcache_kit_tcp_transport.wire import Frame, Kind, Op, Request, pack_frame, pack_request
from xxhash import xxh3_64_intdigest

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Link, ReadableRegion, Region
from lmcache_kit.testing.hosts import Stall, cut, flip
from tests.support.processes import freeze
from tests.support.waiting import eventually

WAIT_S = 20.0
HEADER = 32
FIRST_PAYLOAD = 3 * HEADER  # what the host says before: its greeting, that it sends, a region
NBYTES = 100_000
EMPTY = xxh3_64_intdigest(bytes(4 << 20))


@pytest.mark.parametrize("at", [0, 50_000, NBYTES - 1])
def test_a_byte_that_changed_on_the_wire_is_noticed(
    source: Any, sink: Any, link_through: Any, at: int
) -> None:
    link = link_through(flip(FIRST_PAYLOAD + at))
    payload = os.urandom(NBYTES)
    offer = source.offer([payload])
    region = sink.allocate(NBYTES)
    [landed] = link.read(offer, [region], WAIT_S)
    assert landed.checksum == xxh3_64_intdigest(sink.bytes_of(region))
    assert landed.checksum != xxh3_64_intdigest(payload)
    [again] = link.read(offer, [region], WAIT_S)
    assert again.checksum == xxh3_64_intdigest(payload)


@pytest.mark.parametrize("at", range(HEADER, FIRST_PAYLOAD, 5))
def test_a_header_that_changed_on_the_wire_is_noticed(
    source: Any, sink: Any, link_through: Any, at: int
) -> None:
    link = link_through(flip(at))
    with pytest.raises(TransportError, match=r"begins no frame|version|is corrupt"):
        list(link.read(source.offer([b"x" * 9]), [sink.allocate(9)], WAIT_S))
    assert not any(sink.memory)


def test_a_byte_that_changed_is_noticed_with_and_without_tls(
    over: Callable[..., Any],
) -> None:
    source, sink, link = over(change=flip(50_000))
    payload = os.urandom(NBYTES)
    with contextlib.suppress(TransportError):  # TLS hangs up
        [landed] = link.read(source.offer([payload]), [sink.allocate(NBYTES)], WAIT_S)
        assert landed.checksum != xxh3_64_intdigest(payload)


@pytest.mark.parametrize("at", [HEADER, FIRST_PAYLOAD - 1, FIRST_PAYLOAD + 70_000])
def test_a_connection_that_is_cut_ends_the_read(
    source: Any, sink: Any, link_through: Any, at: int
) -> None:
    link = link_through(cut(at))
    with pytest.raises(TransportError, match="is lost: it closed the connection"):
        list(link.read(source.offer([os.urandom(NBYTES)]), [sink.allocate(NBYTES)], WAIT_S))


def test_a_peer_that_stalls_costs_no_more_than_the_deadline(over: Callable[..., Any]) -> None:
    stall = Stall(FIRST_PAYLOAD + NBYTES + 50_000)
    source, sink, link = over(change=stall)
    offer = source.offer([b"a" * NBYTES, b"b" * NBYTES])
    reading = link.read(offer, [sink.allocate(NBYTES), sink.allocate(NBYTES)], 3.0)
    assert next(reading).number == 0
    with pytest.raises(TransferTimeout, match=r"1 of 2 regions came from .* within 3 s") as late:
        list(reading)
    assert late.value.settled()
    before = bytes(sink.memory)
    stall.go_on.set()
    eventually(lambda: not any(each.is_alive() for each in source.serving))
    assert bytes(sink.memory) == before


def test_a_peer_that_sends_too_slowly_is_late(source: Any, sink: Any, link_through: Any) -> None:
    def drip(position: int, data: bytes) -> bytes:
        if position >= HEADER:
            time.sleep(0.05)
        return data

    link = link_through(drip)
    offer = source.offer([os.urandom(4 << 20)])
    with pytest.raises(TransferTimeout, match="0 of 1 regions"):
        list(link.read(offer, [sink.allocate(4 << 20)], 0.3))


def test_a_time_that_is_over_before_it_began_is_a_timeout(
    source: Any, sink: Any, link: Link
) -> None:
    with pytest.raises(TransferTimeout, match="0 of 1 regions"):
        list(link.read(source.offer([b"x"]), [sink.allocate(1)], 0))


def test_after_a_timeout_nothing_lands_of_a_process_that_was_only_stopped(
    sink: Any, new_host: Callable[..., Any], serving_process: Any
) -> None:
    process, port, offer = serving_process
    sink = new_host(128 << 20)

    def dial(timeout_s: float) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), timeout_s)
        connection.settimeout(None)
        return connection

    link = sink.link_to(sink, dial)
    into = [sink.allocate(32 << 20) for _ in range(4)]
    reading = link.read(offer, into, 2.0)
    assert next(reading).number == 0
    freeze(process.pid)
    with pytest.raises(TransferTimeout, match="of 4 regions came") as late:
        list(reading)
    assert late.value.settled()
    before = bytes(sink.memory)
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == "served\n"
    assert sink.memory == before


def test_a_process_that_dies_ends_the_read_at_once(
    new_host: Callable[..., Any], serving_process: Any
) -> None:
    process, port, offer = serving_process
    sink = new_host(128 << 20)
    link = sink.link_to(sink, lambda s: socket.create_connection(("127.0.0.1", port)))
    reading = link.read(offer, [sink.allocate(32 << 20) for _ in range(4)], WAIT_S)
    next(reading)
    process.kill()
    with pytest.raises(TransportError, match="is lost") as lost:
        list(reading)
    assert not isinstance(lost.value, TransferTimeout)


def test_withdrawing_cuts_off_what_is_being_sent(over: Callable[..., Any]) -> None:
    nbytes = 64 << 20
    source, sink, link = over(nbytes)
    offer = source.offer([b"a" * 1000, b"a" * (nbytes - 1000)])
    reading = link.read(offer, [sink.allocate(1000), sink.allocate(nbytes - 1000)], WAIT_S)
    next(reading)
    source.transport.withdraw(offer)
    source.memory[:] = b"z" * nbytes
    with pytest.raises(TransportError, match="is lost"):
        list(reading)
    assert bytes(sink.memory).strip(b"\0").strip(b"a") == b""


def test_withdrawing_what_has_just_been_read_leaves_the_connection_alone(
    source: Any, sink: Any, link: Link
) -> None:
    into, checksum = [sink.allocate(NBYTES)], xxh3_64_intdigest(bytes(NBYTES))
    for _ in range(100):
        offer = source.transport.offer([ReadableRegion(Region(0, NBYTES), checksum)])
        assert len(list(link.read(offer, into, WAIT_S))) == 1
        source.transport.withdraw(offer)


def test_a_peer_that_takes_nothing_is_given_up(
    over: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, link = over()
    offer = source.transport.offer([ReadableRegion(Region(0, 4 << 20), EMPTY)] * 20)
    monkeypatch.setattr(serving, "STALL_S", 0.2)
    reading = link.read(offer, [Region(0, 4 << 20)] * 20, WAIT_S)
    next(reading)
    eventually(lambda: not source.serving[0].is_alive())
    with pytest.raises(TransportError, match="is lost"):
        list(reading)


@given(noise=st.binary(min_size=HEADER, max_size=200))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_noise_ends_the_connection_it_comes_on_and_no_other(
    source: Any, sink: Any, link: Link, noise: bytes
) -> None:
    with source.dial() as noisy:
        noisy.settimeout(WAIT_S)
        noisy.sendall(noise)
        assert not any(iter(lambda: received(noisy), b""))
    assert len(list(link.read(source.offer([]), [], WAIT_S))) == 0


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1024)
    except ConnectionResetError:
        return b""


@given(noise=st.binary(min_size=HEADER, max_size=HEADER), sure=st.booleans())
def test_noise_is_neither_a_frame_nor_a_request(noise: bytes, sure: bool) -> None:
    if sure:
        noise = b"LKTa\0\1" + noise[6:]
    for unpack in (wire.unpack_frame, wire.unpack_request):
        with pytest.raises(TransportError):
            unpack(noise)


def test_a_request_for_what_there_is_not_is_an_error(source: Any) -> None:
    body = struct.pack("!4sHHI16s", b"LKTq", 1, 99, 0, bytes(16))
    with pytest.raises(TransportError, match=r"requests 99; known are \[1, 2\]"):
        wire.unpack_request(wire.with_checksum(body))


def test_an_address_of_another_version_is_refused_by_name(sink: Any, source: Any) -> None:
    address = source.transport.address().replace(b"\x01", b"\x07")
    with pytest.raises(TransportError, match=r"speaks version 7 of .* tcp, this side 1"):
        sink.transport.connect(address, source.dial, WAIT_S)


@pytest.mark.parametrize("address", [b"", b"\xc1", b"\x80", b"\x81\xa7version\xa11"])
def test_what_is_no_address_is_said_to_be_none(sink: Any, source: Any, address: bytes) -> None:
    with pytest.raises(TransportError, match="the peer's address is no address of tcp"):
        sink.transport.connect(address, source.dial, WAIT_S)


def answering(answer: bytes) -> Callable[[float], socket.socket]:
    """Dials a peer that has said this before it is asked."""

    def dial(_: float) -> socket.socket:
        near, far = socket.socketpair()
        far.sendall(answer)
        far.shutdown(socket.SHUT_WR)
        threading.Thread(target=drain, args=[far]).start()
        return near

    return dial


def drain(connection: socket.socket) -> None:
    with connection:
        while received(connection):
            pass


def test_a_peer_that_answers_in_another_version_is_refused_by_name(source: Any, sink: Any) -> None:
    other = pack_frame(Frame(Kind.HELLO)).replace(b"LKTa\0\1", b"LKTa\0\3")
    with pytest.raises(TransportError, match="version 3 of the transport tcp, this side 1"):
        sink.link_to(source, answering(other))


def test_a_peer_that_asks_in_another_version_is_told_so(source: Any) -> None:
    request = pack_request(Request(Op.HELLO)).replace(b"LKTq\0\1", b"LKTq\0\3")
    with source.dial() as other:
        other.settimeout(WAIT_S)
        other.sendall(request)
        said = b"".join(iter(lambda: received(other), b""))
    assert wire.unpack_frame(said[:HEADER]).kind is Kind.REFUSED
    assert b"the peer speaks version 3 of the transport tcp, this side 1" in said[HEADER:]


HELLO = pack_frame(Frame(Kind.HELLO))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(HEADER), "which begins no frame"),
        (pack_frame(Frame(Kind.READING)), "answers Frame.* to a greeting"),
        (pack_frame(Frame(Kind.REFUSED, nbytes=1 << 40)), "gives a reason of 1099511627776 bytes"),
        (pack_frame(Frame(Kind.REFUSED, nbytes=1)) + b"x", "a reason that is corrupt"),
        (HELLO + HELLO, "answers Frame.*asked for 1 regions"),
        (HELLO + pack_frame(Frame(Kind.READING, 2)), "answers Frame.*asked for 1 regions"),
        (HELLO + pack_frame(Frame(Kind.READING, 1)) + HELLO, "instead of region 0"),
        (
            HELLO + pack_frame(Frame(Kind.READING, 1)) + pack_frame(Frame(Kind.REGION, 1, 4)),
            "instead of region 0",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_an_error(
    source: Any, sink: Any, answer: bytes, says: str
) -> None:
    with pytest.raises(TransportError, match=says):
        list(sink.link_to(source, answering(answer)).read(bytes(19) + b"\1", [Region(0, 4)], 5))
    assert not any(sink.memory)


def test_a_peer_that_does_not_greet_is_late(source: Any, sink: Any) -> None:
    near, far = socket.socketpair()
    with far, pytest.raises(TransferTimeout, match="took too long"):
        sink.link_to(source, lambda _: near, timeout_s=0.1)
    assert near.fileno() == -1


def test_a_peer_that_nobody_can_dial_is_an_error(source: Any, sink: Any) -> None:
    def dial(_: float) -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(TransportError, match=r"cannot be reached over TCP: .* refused"):
        sink.link_to(source, dial)


def test_what_dialling_says_about_the_peer_is_passed_on(source: Any, sink: Any) -> None:
    def dial(_: float) -> socket.socket:
        raise TransportError("the peer has another secret")

    with pytest.raises(TransportError, match=r"^the peer has another secret$"):
        sink.link_to(source, dial)


@pytest.mark.parametrize("of", ["link", "transport"])
def test_closing_from_another_thread_ends_a_read(over: Callable[..., Any], of: str) -> None:
    stall = Stall(FIRST_PAYLOAD + NBYTES + 50_000)
    source, sink, link = over(change=stall)
    offer = source.offer([b"a" * NBYTES, b"b" * NBYTES])
    reading = link.read(offer, [sink.allocate(NBYTES), sink.allocate(NBYTES)], WAIT_S)
    next(reading)
    closing = threading.Timer(0.05, link.close if of == "link" else sink.transport.close)
    closing.start()
    with pytest.raises(TransportError, match="was closed on this side"):
        list(reading)
    closing.join(WAIT_S)
    stall.go_on.set()


def test_closing_waits_for_the_call_that_is_moving_bytes() -> None:
    near, far = socket.socketpair()
    connection = Connection(near)
    closing = threading.Thread(target=connection.close)
    with far, connection.using_socket(socket.SO_RCVTIMEO, None):
        closing.start()
        assert far.recv(1) == b""  # it has begun
        closing.join(0.1)
        assert closing.is_alive()
        assert near.fileno() != -1
    closing.join(WAIT_S)
    assert near.fileno() == -1


def test_closing_the_serving_side_ends_what_it_serves(source: Any, sink: Any, link: Link) -> None:
    source.transport.close()
    source.transport.close()
    eventually(lambda: not any(each.is_alive() for each in source.serving))
    with pytest.raises(TransportError, match="is lost"):
        list(link.read(bytes(20), [], WAIT_S))


def test_a_closed_transport_takes_part_in_nothing(source: Any, sink: Any) -> None:
    source.transport.close()
    near, far = socket.socketpair()
    with far:
        source.transport.serve(near)
        assert far.recv(1) == b""
    with pytest.raises(TransportError, match="the transport is closed"):
        source.transport.offer([])
    with pytest.raises(TransportError, match="the transport is closed"):
        source.link_to(sink)


def test_a_link_can_be_closed_twice(link: Link) -> None:
    link.close()
    link.close()
