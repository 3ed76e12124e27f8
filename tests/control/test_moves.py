"""Moves from a controller to agents: which end is asked for what, and with which proof."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from lmcache_kit.controller import operation_log
from lmcache_kit.controller.operations import Operations
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    KitError,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import OperationInfo
from lmcache_kit.interfaces.operations import Move, OperationStatus, Progress, Scope, Transfer
from lmcache_kit.keys import pack_tokens
from lmcache_kit.protocol.capability import Capability
from lmcache_kit.protocol.control import Register
from tests.control.conftest import Running, StartAgent
from tests.control.fakes import LOCATION, FakeExecutor, FakeTier, RunningFake, chunks_of
from tests.support.clocks import FakeClock
from tests.support.waiting import eventually

PROMPT = list(range(100, 112))
KEYS = {"a": b"a" * 32, "b": b"b" * 32}
MOVE = Move(
    location=LOCATION,
    tokens=pack_tokens(PROMPT),
    cache_salt="salt",
    model="some/model",
    source="a",
    source_location=LOCATION,
)


class Site:
    """A controller, and instances that take part in moves: their tiers and executors."""

    def __init__(self, controller: Running, start_agent: StartAgent) -> None:
        self.running = controller
        self.api = controller.controller.operations
        self.executors: dict[str, FakeExecutor] = {}
        self.engines: dict[str, FakeTier] = {}
        self.start_agent = start_agent

    def start(
        self,
        name: str,
        *,
        peers: bool = True,
        location: str = LOCATION,
        below: Sequence[FakeTier] = (),
    ) -> None:
        self.executors[name] = executor = FakeExecutor()
        agent, self.engines[name] = self.start_agent(
            self.running.url,
            name,
            executor=executor,
            engine=FakeTier(location),
            below=below,
            incarnation=name.encode() * 16,
            peer_url=f"localhost:{name}" if peers else None,
            peer_key=KEYS.get(name, b"x" * 32) if peers else b"",
        )
        eventually(lambda: agent.stats()["registered"])

    def start_move(self, move: Move = MOVE, to: str = "b", **more: Any) -> OperationInfo:
        return self.running.run(self.api.start(to, move, **more))

    def operation(self, name: str = "b") -> RunningFake:
        eventually(lambda: self.executors[name].running)
        return self.executors[name].running[0]

    def request(self) -> Move:
        request = self.operation().request
        assert isinstance(request, Move)
        return request

    def all(self) -> list[OperationInfo]:
        return self.running.call(self.api.all)

    def wait(self, operation_id: str) -> OperationInfo:
        return self.running.run(self.api.wait(operation_id))


@pytest.fixture
def site(controller: Running, start_agent: StartAgent) -> Site:
    """Instances a and b."""
    made = Site(controller, start_agent)
    made.start("a")
    made.start("b")
    return made


def test_the_destination_gets_the_address_of_the_source_and_a_proof_for_it(
    site: Site,
) -> None:
    taken = site.start_move()
    assert (taken.state, taken.tokens, taken.kind) == ("running", 12, "move")
    assert (taken.instance_id, taken.location, taken.source) == ("b", LOCATION, ("a", LOCATION))
    move = site.request()
    assert msgspec.structs.replace(move, peer=None) == MOVE
    assert move.peer
    assert (move.peer.operation_id, move.peer.url) == (taken.operation_id, "localhost:a")
    assert move.peer.incarnation == b"a" * 16
    assert site.executors["a"].running == []


def test_the_proof_is_of_this_move_and_no_other(site: Site) -> None:
    operation_id = site.start_move().operation_id
    move = site.request()
    assert move.peer
    seal = move.peer.seal
    assert Capability.of(move, operation_id, "b").is_sealed(seal, KEYS["a"])
    assert not Capability.of(move, operation_id, "b").is_sealed(seal, KEYS["b"])
    assert not Capability.of(move, "another", "b").is_sealed(seal, KEYS["a"])
    assert not Capability.of(move, operation_id, "c").is_sealed(seal, KEYS["a"])
    everything = msgspec.structs.replace(move, tokens=None)
    assert not Capability.of(everything, operation_id, "b").is_sealed(seal, KEYS["a"])


def test_each_operation_has_a_proof_of_its_own(site: Site) -> None:
    site.start_move()
    site.start_move()
    first, second = (each.request.peer for each in site.executors["b"].running)  # type: ignore[union-attr]
    assert first.operation_id != second.operation_id
    assert first.seal != second.seal


def test_7_that_the_source_keeps_its_copy_reaches_the_destination_and_is_sealed(site: Site) -> None:
    operation_id = site.start_move(msgspec.structs.replace(MOVE, copy=True)).operation_id
    move = site.request()
    assert move.copy
    assert move.peer
    moved = msgspec.structs.replace(move, copy=False)
    assert not Capability.of(moved, operation_id, "b").is_sealed(move.peer.seal, KEYS["a"])


def test_progress_names_the_transport(site: Site) -> None:
    operation_id = site.start_move().operation_id
    transfer = Transfer("nixl", "CMA on one host", 3_000_000, 0.5)
    done = Progress(3, 3, 900, 900, transfer)
    site.operation().listener.progressed(done)
    site.operation().end(OperationStatus("done", 12, done))
    ended = site.wait(operation_id)
    assert (ended.state, ended.tokens, ended.ratio) == ("done", 12, None)
    assert (ended.instance_id, ended.progress.transfer) == ("b", transfer)


@pytest.mark.parametrize("accepted", [None, Scope(12, 3)])
def test_7_the_destinations_failure_is_a_failure_and_the_source_is_told_to_forget_nothing(
    site: Site, accepted: Scope | None
) -> None:
    site.engines["a"].store(chunks_of(PROMPT))
    site.executors["b"].scope = accepted
    site.executors["b"].at_once = OperationStatus("failed", message="no room at 'b'")
    if accepted is None:
        with pytest.raises(OperationFailed, match="no room at 'b'"):
            site.start_move()
    else:
        site.wait(site.start_move().operation_id)
    (event,) = site.all()
    assert (event.state, event.tokens, event.message) == ("failed", 0, "no room at 'b'")
    assert site.executors["a"].running == []
    eventually(lambda: site.running.held(PROMPT) == {"a": 12})


def test_7_a_move_has_a_deadline_and_is_called_off_then(site: Site) -> None:
    info = site.start_move()
    assert info.deadline == pytest.approx(info.created + operation_log.LONG_S)
    assert site.wait(site.start_move(deadline_s=0.3).operation_id).state == "expired"
    assert site.executors["b"].running[1].cancelled.wait(10)


def test_a_move_is_answered_when_it_is_accepted(site: Site) -> None:
    site.executors["b"].scope = None
    asked = threading.Thread(target=site.start_move)
    asked.start()
    operation = site.operation()
    assert [event.state for event in site.all()] == ["queued"]
    operation.accept(8, 2)
    asked.join(20)
    (event,) = site.all()
    assert (event.state, event.tokens, event.progress.chunks) == ("running", 8, 2)


def test_a_move_that_is_late_before_it_began_is_too_late(site: Site) -> None:
    site.executors["b"].scope = None
    site.executors["b"].at_once = OperationStatus("expired", message="'a' did not answer")
    with pytest.raises(DeadlineExceeded, match="'a' did not answer"):
        site.start_move()


def test_a_move_that_failed_before_it_began_may_be_tried_again_with_its_key(site: Site) -> None:
    executor = site.executors["b"]
    executor.scope, executor.at_once = (
        None,
        OperationStatus("failed", message="'a' does not answer"),
    )
    with pytest.raises(OperationFailed):
        site.start_move(idempotency_key="k")
    executor.scope, executor.at_once = Scope(12, 3), None
    operation_id = site.start_move(idempotency_key="k").operation_id
    assert site.start_move(idempotency_key="k").operation_id == operation_id
    assert len(executor.running) == 2


def test_the_same_key_is_the_same_move_whoever_serves_the_source_by_now(site: Site) -> None:
    operation_id = site.start_move(idempotency_key="k").operation_id
    site.start_agent(site.running.url, "a", peer_url="localhost:z", peer_key=b"z" * 32)
    eventually(lambda: site.running.counters()["fenced_total"] >= 1)
    assert site.start_move(idempotency_key="k").operation_id == operation_id
    with pytest.raises(ControlError, match="stands for another operation"):
        site.start_move(msgspec.structs.replace(MOVE, copy=True), idempotency_key="k")


@pytest.mark.parametrize(
    ("changes", "to", "raised", "message"),
    [
        ({}, "x", UnknownName, r"unknown instance 'x'\. Known: a, b, c, d"),
        ({"source": "x"}, "b", UnknownName, r"unknown instance 'x'\. Known: a, b, c, d"),
        ({"location": "x"}, "b", UnknownName, r"unknown location 'x'\. Known: LocalCPUBackend"),
        ({"source_location": "x"}, "b", UnknownName, r"unknown location 'x'\. Known: Local"),
        ({"source": "c", "source_location": LOCATION}, "b", UnknownName, r"Known: disk"),
        ({}, "a", InvalidQuery, "source and destination are the same"),
        ({}, "d", ControlError, "'d' takes no part in moves. Set enable_p2p, p2p_host and p2p_ini"),
        ({"source": "d"}, "b", ControlError, "'d' takes no part in moves. Set enable_p2p"),
    ],
)
def test_an_impossible_move_is_refused_and_not_logged(
    site: Site, changes: dict[str, str], to: str, raised: type[KitError], message: str
) -> None:
    site.start("c", location="disk")
    site.start("d", peers=False)
    with pytest.raises(raised, match=message) as info:
        site.start_move(msgspec.structs.replace(MOVE, **changes), to=to)
    assert type(info.value) is raised
    assert site.all() == []


def test_a_move_from_one_location_of_an_instance_to_another_needs_no_peer(site: Site) -> None:
    site.start("c", peers=False, below=[FakeTier("disk")])
    move = msgspec.structs.replace(MOVE, source="c", location="disk")
    taken = site.start_move(move, to="c")
    assert (taken.instance_id, taken.location, taken.source) == ("c", "disk", ("c", LOCATION))
    assert site.operation("c").request == move


@pytest.mark.parametrize("silent", ["a", "b"])
def test_both_ends_must_be_alive(silent: str) -> None:
    clock = FakeClock()
    registry = Registry(clock=clock)
    operations = Operations(registry, lambda connection, message: None, clock=clock)
    for name in ("a", "b"):
        registration = Register(
            name, b"i" * 16, 1.0, "", 1.0, (LOCATION,), (), (), f"localhost:{name}", KEYS[name]
        )
        registry.handle(name, registration)
    clock.now += 10
    registry.hear("a" if silent == "b" else "b")
    with pytest.raises(NoWorker, match=f"'{silent}' has not been heard of for"):
        operations.submit("b", MOVE)
    assert operations.all() == []


def test_the_keys_of_peers_are_shown_to_nobody(
    controller: Running, start_agent: StartAgent, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        site = Site(controller, start_agent)
        site.start("a")
        site.start("b")
        site.start_move()
        with pytest.raises(InvalidQuery) as refused:
            site.start_move(to="a")
    process = controller.call(controller.registry.find, "a")
    shown = [
        caplog.text,
        repr(refused.value),
        repr(controller.call(controller.controller.instances.workers)),
        repr(site.all()),
        repr(controller.counters()),
        repr(process.registration),
    ]
    assert not [text for text in shown if "a" * 32 in text or (b"a" * 32).hex() in text]
