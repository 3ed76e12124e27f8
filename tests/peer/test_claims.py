"""Who may take what: claims, seals, and peers that make no sense."""

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


def claim(**changes: object) -> Capability:
    fields: dict[str, object] = {
        "event_id": "e",
        "source": "a",
        "location": "L",
        "destination": "b",
        "tokens": b"1234",
        "cache_salt": "",
        "model": None,
        "copy": False,
    }
    return Capability(**{**fields, **changes})  # type: ignore[arg-type]


def opened(goal: Place, source: Place, **how: object) -> wire.Open:
    order: Move = goal.order(source, **how)  # type: ignore[arg-type]
    assert order.peer
    what = Capability.of(order, order.peer.event_id, goal.name)
    return wire.Open(wire.VERSION, what, order.peer.seal, source.incarnation, ())


def open_remote(source: Place, first: wire.Open) -> SourceClient:
    return SourceClient.open(lambda left_s: dial(source.node.url, left_s), "it", first, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"event_id": "f"},
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
def test_a_seal_holds_for_every_field_of_its_claim(change: dict[str, object]) -> None:
    seal = claim().seal(KEY)
    assert claim().is_sealed(seal, KEY)
    assert not claim(**change).is_sealed(seal, KEY)
    assert not claim().is_sealed(seal, bytes(32))


def test_a_claim_that_the_controller_did_not_seal_is_refused(source: Place, goal: Place) -> None:
    source.store(range(16))
    narrow = Capability.of(goal.order(source, range(4), event_id="e"), "e", goal.name)
    outcome = goal.begin(goal.order(source, range(16), event_id="e", sealed=narrow)).outcome
    assert outcome.state == "failed"
    assert "not sealed by our controller" in outcome.message
    assert source.hit(range(16)) == 16


def test_an_event_takes_once(source: Place, goal: Place) -> None:
    source.store(range(16))
    order = goal.order(source, range(16), event_id="e", copy=True)
    assert goal.begin(order).outcome.state == "done"
    again = goal.begin(order).outcome
    assert (again.state, again.tokens) == ("failed", 0)
    assert "event e has been here before" in again.message


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
    assert f"nobody answers at 127.0.0.1:{port}" in outcome.message


def test_a_peer_may_only_borrow_and_delete_what_its_claim_names(source: Place, goal: Place) -> None:
    source.store(range(16))
    source.store(range(100, 116))
    [other] = [h.key for h in source.engine.chunk_refs(None, pack_tokens(range(100, 116)))]
    for ask in (lambda r: r.lend([other], "tcp"), lambda r: r.forget([other])):
        remote = open_remote(source, opened(goal, source, tokens=range(16)))
        with pytest.raises(OperationFailed, match="the claim does not name"):
            ask(remote)
        remote.close()
    assert source.hit(range(100, 116)) == 16


def test_a_copy_may_delete_nothing(source: Place, goal: Place) -> None:
    source.store(range(16))
    remote = open_remote(source, opened(goal, source, tokens=range(16), copy=True))
    with pytest.raises(OperationFailed, match="a copy leaves its source as it is"):
        remote.forget([holding.key for holding in remote.holdings()])
    remote.close()


def test_only_what_was_lent_can_be_offered(source: Place, goal: Place) -> None:
    source.store(range(32))
    first = opened(goal, source, tokens=range(32))
    remote = open_remote(source, first)
    lent = remote.lend([remote.holdings()[0].key], "tcp")
    assert len(lent.parcels) == 1
    with pytest.raises(OperationFailed, match="a parcel that was not lent"):
        remote.offer(lent.lease, "tcp", [1])
    remote.close()


def test_what_was_lent_comes_back_when_the_peer_hangs_up(
    source: Place, goal: Place, eventually: Eventually
) -> None:
    source.store(range(32))
    remote = open_remote(source, opened(goal, source, tokens=range(32)))
    lent = remote.lend([holding.key for holding in remote.holdings()], "tcp")
    remote.offer(lent.lease, "tcp", [0, 1])
    assert source.stats()["leases"] == 1
    remote.close()
    eventually(lambda: source.stats()["leases"] == 0)


def test_a_transport_is_attached_only_with_the_token_of_a_move_that_goes_on(
    source: Place, goal: Place
) -> None:
    def connect(left_s: float) -> socket.socket:
        return dial(source.node.url, left_s)

    with pytest.raises(TransportError, match="no move goes on by this token"):
        attach(connect, "it", "tcp", secrets.token_bytes(16), 5)
    remote = open_remote(source, opened(goal, source))
    attach(connect, "it", "tcp", remote.welcome.token, 5).close()
    with pytest.raises(TransportError, match="transfer_channel leaves tcp"):
        attach(connect, "it", "nixl", remote.welcome.token, 5)
    remote.close()


def test_another_version_is_refused_by_number(source: Place, goal: Place) -> None:
    first = msgspec.structs.replace(opened(goal, source), version=9)
    with pytest.raises(OperationFailed, match="peers here speak version 1, not 9"):
        open_remote(source, first)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 5) + b"\xff" * 5,
        struct.pack("<I", wire.MAX_FIRST_FRAME_BYTES + 1),
        struct.pack("<I", 100) + b"short",
        struct.pack("<I", 4) + msgspec.msgpack.encode({"type": "lend", "keys": []})[:4],
    ],
    ids=["nothing", "http", "garbage", "too long", "cut short", "half a message"],
)
def test_what_makes_no_sense_is_hung_up_on_and_moves_go_on(
    source: Place, goal: Place, data: bytes
) -> None:
    with dial(source.node.url, 5) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        except OSError as error:  # it may hang up before we have said all
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
    source.store(range(16))
    assert goal.move(source, range(16)).state == "done"


def test_a_question_that_needs_a_claim_first_gets_no_answer(source: Place) -> None:
    with dial(source.node.url, 5) as connection:
        wire.send(connection, wire.Lend((), "tcp"), 5)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_message_or_a_protocol_error(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("<I", len(body)) + body)
        with contextlib.suppress(ProtocolError):
            assert wire.receive_question(theirs, 5) is not None


def test_keys_and_seals_are_in_no_message(
    source: Place, goal: Place, caplog: pytest.LogCaptureFixture
) -> None:
    source.store(range(16))
    outcome = goal.move(source, range(16), incarnation=bytes(16))
    assert source.node.key.hex() not in outcome.message + caplog.text
    assert repr(source.node.key) not in outcome.message + caplog.text
