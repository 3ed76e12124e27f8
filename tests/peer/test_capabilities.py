"""Capabilities: what a peer may take, and peers that break the protocol."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import struct
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_kit.errors import OperationFailed, ProtocolError, TransportError
from lmcache_kit.interfaces.operations import Move
from lmcache_kit.keys import pack_tokens
from lmcache_kit.peer.sockets import dial
from lmcache_kit.peer.source_client import SourceClient, attach
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.capability import Capability

if TYPE_CHECKING:
    from .conftest import Eventually, Place

KEY = bytes(range(32))


def capability(**changes: object) -> Capability:
    fields: dict[str, object] = {
        "operation_id": "e",
        "source": "a",
        "location": "L",
        "destination": "b",
        "tokens": b"1234",
        "cache_salt": "",
        "model": None,
        "copy": False,
    }
    return Capability(**{**fields, **changes})  # type: ignore[arg-type]


def opening(goal: Place, source: Place, **how: object) -> wire.Open:
    request: Move = goal.request(source, **how)  # type: ignore[arg-type]
    assert request.peer
    what = Capability.of(request, request.peer.operation_id, goal.name)
    return wire.Open(wire.VERSION, what, request.peer.signature, source.incarnation, ())


def open_client(source: Place, first: wire.Open) -> SourceClient:
    return SourceClient.open(lambda left_s: dial(source.peer.url, left_s), "it", first, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"operation_id": "f"},
        {"source": "c"},
        {"location": "M"},
        {"destination": "c"},
        {"tokens": None},
        {"tokens": b"1235"},
        {"cache_salt": "s"},
        {"model": ""},
        {"copy": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_signature_holds_for_every_field_of_its_capability(change: dict[str, object]) -> None:
    signature = capability().sign(KEY)
    assert capability().verify(signature, KEY)
    assert not capability(**change).verify(signature, KEY)
    assert not capability().verify(signature, bytes(32))


def test_a_capability_that_the_controller_did_not_sign_is_refused(
    source: Place, goal: Place
) -> None:
    source.store(range(16))
    narrow = Capability.of(goal.request(source, range(4), event_id="e"), "e", goal.name)
    outcome = goal.start(goal.request(source, range(16), event_id="e", signed=narrow)).outcome
    assert outcome.state == "failed"
    assert "not signed by our controller" in outcome.message
    assert source.hit(range(16)) == 16


def test_an_event_takes_once(source: Place, goal: Place) -> None:
    source.store(range(16))
    request = goal.request(source, range(16), event_id="e", copy=True)
    assert goal.start(request).outcome.state == "done"
    again = goal.start(request).outcome
    assert (again.state, again.tokens) == ("failed", 0)
    assert "operation e was served before" in again.message


def test_another_life_of_the_source_is_not_taken_from(source: Place, goal: Place) -> None:
    source.store(range(16))
    outcome = goal.move(source, range(16), incarnation=bytes(16))
    assert outcome.state == "failed"
    assert "has been restarted since" in outcome.message


def test_a_source_where_nobody_listens_is_named_at_once(source: Place, goal: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    outcome = goal.move(source, range(16), url=f"127.0.0.1:{port}")
    assert outcome.state == "failed"
    assert f"cannot connect to 127.0.0.1:{port}" in outcome.message


def test_a_peer_may_only_lease_and_delete_what_its_capability_covers(
    source: Place, goal: Place
) -> None:
    source.store(range(16))
    source.store(range(100, 116))
    [other] = [
        h.key for h in source.engine.memory_tier.chunk_refs(None, pack_tokens(range(100, 116)))
    ]
    for ask in (lambda c: c.lease([other], "tcp"), lambda c: c.delete([other])):
        client = open_client(source, opening(goal, source, tokens=range(16)))
        with pytest.raises(OperationFailed, match="the capability does not cover"):
            ask(client)
        client.close()
    assert source.hit(range(100, 116)) == 16


def test_a_copy_may_delete_nothing(source: Place, goal: Place) -> None:
    source.store(range(16))
    client = open_client(source, opening(goal, source, tokens=range(16), copy=True))
    with pytest.raises(OperationFailed, match="a copy leaves its source as it is"):
        client.delete([chunk.key for chunk in client.chunks()])
    client.close()


def test_only_leased_chunks_can_be_offered(source: Place, goal: Place) -> None:
    source.store(range(32))
    first = opening(goal, source, tokens=range(32))
    client = open_client(source, first)
    leased = client.lease([client.chunks()[0].key], "tcp")
    assert len(leased.descriptors) == 1
    with pytest.raises(OperationFailed, match="a chunk that is not leased"):
        client.read_offer(leased.lease, "tcp", [1])
    client.close()


def test_leases_end_when_the_peer_hangs_up(
    source: Place, goal: Place, eventually: Eventually
) -> None:
    source.store(range(32))
    client = open_client(source, opening(goal, source, tokens=range(32)))
    leased = client.lease([chunk.key for chunk in client.chunks()], "tcp")
    client.read_offer(leased.lease, "tcp", [0, 1])
    assert source.stats()["leases"] == 1
    client.close()
    eventually(lambda: source.stats()["leases"] == 0)


def test_a_transport_is_attached_only_with_the_token_of_a_move_that_goes_on(
    source: Place, goal: Place
) -> None:
    def connect(left_s: float) -> socket.socket:
        return dial(source.peer.url, left_s)

    with pytest.raises(TransportError, match="no move has this token"):
        attach(connect, "it", "tcp", secrets.token_bytes(16), 5)
    client = open_client(source, opening(goal, source))
    attach(connect, "it", "tcp", client.welcome.token, 5).close()
    with pytest.raises(TransportError, match="transfer_channel leaves tcp"):
        attach(connect, "it", "nixl", client.welcome.token, 5)
    client.close()


def test_another_version_is_refused_by_number(source: Place, goal: Place) -> None:
    first = msgspec.structs.replace(opening(goal, source), version=9)
    with pytest.raises(
        OperationFailed, match=f"speaks protocol version {wire.VERSION}, the other side 9"
    ):
        open_client(source, first)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 5) + b"\xff" * 5,
        struct.pack("<I", wire.MAX_FIRST_FRAME_BYTES + 1),
        struct.pack("<I", 100) + b"short",
        struct.pack("<I", 4) + msgspec.msgpack.encode({"type": "lease", "keys": []})[:4],
    ],
    ids=["nothing", "http", "garbage", "too long", "cut short", "half a message"],
)
def test_a_peer_that_breaks_the_protocol_is_hung_up_on_and_moves_go_on(
    source: Place, goal: Place, data: bytes
) -> None:
    with dial(source.peer.url, 5) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        except OSError as error:  # it may hang up before we have said all
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
    source.store(range(16))
    assert goal.move(source, range(16)).state == "done"


def test_a_request_before_the_capability_gets_no_answer(source: Place) -> None:
    with dial(source.peer.url, 5) as connection:
        wire.send(connection, wire.Lease((), "tcp"), 5)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_message_or_a_protocol_error(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("<I", len(body)) + body)
        with contextlib.suppress(ProtocolError):
            assert wire.receive_request(theirs, 5) is not None


def test_capability_keys_are_in_no_message(
    source: Place, goal: Place, caplog: pytest.LogCaptureFixture
) -> None:
    source.store(range(16))
    outcome = goal.move(source, range(16), incarnation=bytes(16))
    assert source.peer.key.hex() not in outcome.message + caplog.text
    assert repr(source.peer.key) not in outcome.message + caplog.text
