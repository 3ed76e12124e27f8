"""Moves from a real controller to real agents: who is asked for what, and with which proof."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec
import pytest

from lmcache_kit.controller import operation_log as ledgers
from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    KitError,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import OperationInfo, Operation
from lmcache_kit.interfaces.operations import Scope, Move, OperationStatus, Progress, Transfer
from lmcache_kit.keys import pack_tokens
from lmcache_kit.protocol.capability import Capability
from tests.control.conftest import Running, StartAgent
from tests.control.fakes import FakeJob, FakeOperator, FakeTier, LOCATION, chunks_of
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
    """A controller, and instances that take part in moves: their lives, engines and operators."""

    def __init__(self, controller: Running, start_agent: StartAgent) -> None:
        self.running = controller
        self.api = controller.controller
        self.operators: dict[str, FakeOperator] = {}
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
        self.operators[name] = operator = FakeOperator()
        agent, self.engines[name] = self.start_agent(
            self.running.url,
            name,
            operator=operator,
            engine=FakeTier(location),
            below=below,
            incarnation=name.encode() * 16,
            peer_url=f"localhost:{name}" if peers else None,
            peer_key=KEYS.get(name, b"x" * 32) if peers else b"",
        )
        eventually(lambda: agent.stats()["registered"])

    def operate(self, order: Move = MOVE, to: str = "b", **more: object) -> OperationInfo:
        operation = Operation(instance_id=to, order=order, **more)  # type: ignore[arg-type]
        return self.running.run(self.api.operate(operation))

    def job(self, name: str = "b") -> FakeJob:
        eventually(lambda: self.operators[name].jobs)
        return self.operators[name].jobs[0]

    def order(self) -> Move:
        order = self.job().order
        assert isinstance(order, Move)
        return order

    def events(self) -> list[OperationInfo]:
        return self.running.call(self.api.events)

    def ended(self, event_id: str) -> OperationInfo:
        return self.running.run(self.api.ended(event_id))


@pytest.fixture
def site(controller: Running, start_agent: StartAgent) -> Site:
    """Instances a and b."""
    made = Site(controller, start_agent)
    made.start("a")
    made.start("b")
    return made


def test_the_destination_gets_the_order_with_where_to_fetch_and_a_proof_for_the_source(
    site: Site,
) -> None:
    taken = site.operate()
    assert (taken.state, taken.tokens, taken.operation) == ("running", 12, "move")
    assert (taken.instance_id, taken.location, taken.source) == ("b", LOCATION, ("a", LOCATION))
    order = site.order()
    assert msgspec.structs.replace(order, peer=None) == MOVE
    assert order.peer
    assert (order.peer.event_id, order.peer.url) == (taken.event_id, "localhost:a")
    assert order.peer.incarnation == b"a" * 16
    assert site.operators["a"].jobs == []


def test_the_proof_is_of_this_move_and_no_other(site: Site) -> None:
    event_id = site.operate().event_id
    order = site.order()
    assert order.peer
    signature = order.peer.signature
    assert Capability.of(order, event_id, "b").verify(signature, KEYS["a"])
    assert not Capability.of(order, event_id, "b").verify(signature, KEYS["b"])
    assert not Capability.of(order, "another", "b").verify(signature, KEYS["a"])
    assert not Capability.of(order, event_id, "c").verify(signature, KEYS["a"])
    everything = msgspec.structs.replace(order, tokens=None)
    assert not Capability.of(everything, event_id, "b").verify(signature, KEYS["a"])


def test_each_event_has_a_proof_of_its_own(site: Site) -> None:
    site.operate()
    site.operate()
    first, second = (job.order.peer for job in site.operators["b"].jobs)  # type: ignore[union-attr]
    assert first.event_id != second.event_id
    assert first.signature != second.signature


def test_7_that_the_source_keeps_its_copy_reaches_the_destination_and_is_signed(site: Site) -> None:
    event_id = site.operate(msgspec.structs.replace(MOVE, copy=True)).event_id
    order = site.order()
    assert order.copy
    assert order.peer
    moved = msgspec.structs.replace(order, copy=False)
    assert not Capability.of(moved, event_id, "b").verify(order.peer.signature, KEYS["a"])


def test_progress_tells_over_what_the_bytes_come(site: Site) -> None:
    event_id = site.operate().event_id
    transfer = Transfer("nixl", "CMA on one host", 3_000_000, 0.5)
    done = Progress(3, 3, 900, 900, transfer)
    site.job().report(done)
    site.job().finish(OperationStatus("done", 12, done))
    ended = site.ended(event_id)
    assert (ended.state, ended.tokens, ended.ratio) == ("done", 12, None)
    (part,) = ended.parts
    assert (part.instance_id, part.progress.transfer) == ("b", transfer)


@pytest.mark.parametrize("accepted", [None, Scope(12, 3)])
def test_7_the_destinations_failure_is_a_failure_and_the_source_is_told_to_forget_nothing(
    site: Site, accepted: Scope | None
) -> None:
    site.engines["a"].store(chunks_of(PROMPT))
    site.operators["b"].accepts = accepted
    site.operators["b"].at_once = OperationStatus("failed", message="no room at 'b'")
    if accepted is None:
        with pytest.raises(OperationFailed, match="no room at 'b'"):
            site.operate()
    else:
        site.ended(site.operate().event_id)
    (event,) = site.events()
    assert (event.state, event.tokens, event.message) == ("failed", 0, "no room at 'b'")
    assert site.operators["a"].jobs == []
    eventually(lambda: site.running.held(PROMPT) == {"a": 12})


def test_7_a_move_has_a_deadline_and_is_called_off_then(site: Site) -> None:
    info = site.operate()
    assert info.deadline == pytest.approx(info.created + ledgers.LONG_S)
    assert site.ended(site.operate(deadline_s=0.3).event_id).state == "expired"
    assert site.operators["b"].jobs[1].cancelled.wait(10)


def test_a_move_is_answered_when_the_source_has_told_what_it_has(site: Site) -> None:
    site.operators["b"].accepts = None
    asked = threading.Thread(target=site.operate)
    asked.start()
    job = site.job()
    assert [event.state for event in site.events()] == ["queued"]
    job.accepted = Scope(8, 2)
    job.report(Progress(0, 2))
    asked.join(20)
    (event,) = site.events()
    assert (event.state, event.tokens, event.parts[0].progress.chunks) == ("running", 8, 2)


def test_a_move_that_is_late_before_it_began_is_too_late(site: Site) -> None:
    site.operators["b"].accepts = None
    site.operators["b"].at_once = OperationStatus("expired", message="'a' did not answer")
    with pytest.raises(DeadlineExceeded, match="'a' did not answer"):
        site.operate()


def test_a_move_that_failed_before_it_began_may_be_tried_again_with_its_key(site: Site) -> None:
    operator = site.operators["b"]
    operator.accepts, operator.at_once = (
        None,
        OperationStatus("failed", message="'a' does not answer"),
    )
    with pytest.raises(OperationFailed):
        site.operate(idempotency_key="k")
    operator.accepts, operator.at_once = Scope(12, 3), None
    event_id = site.operate(idempotency_key="k").event_id
    assert site.operate(idempotency_key="k").event_id == event_id
    assert len(operator.jobs) == 2


def test_the_same_key_is_the_same_move_whoever_serves_the_source_by_now(site: Site) -> None:
    event_id = site.operate(idempotency_key="k").event_id
    site.start_agent(site.running.url, "a", peer_url="localhost:z", peer_key=b"z" * 32)
    eventually(lambda: site.running.counters()["fenced_total"] >= 1)
    assert site.operate(idempotency_key="k").event_id == event_id
    with pytest.raises(ControlError, match="stands for another operation"):
        site.operate(msgspec.structs.replace(MOVE, copy=True), idempotency_key="k")


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
def test_a_move_that_cannot_be_is_refused_and_no_event(
    site: Site, changes: dict[str, str], to: str, raised: type[KitError], message: str
) -> None:
    site.start("c", location="disk")
    site.start("d", peers=False)
    with pytest.raises(raised, match=message) as info:
        site.operate(msgspec.structs.replace(MOVE, **changes), to=to)
    assert type(info.value) is raised
    assert site.events() == []


def test_a_move_from_one_location_of_an_instance_to_another_needs_no_peer(site: Site) -> None:
    site.start("c", peers=False, below=[FakeTier("disk")])
    order = msgspec.structs.replace(MOVE, source="c", location="disk")
    taken = site.operate(order, to="c")
    assert (taken.instance_id, taken.location, taken.source) == ("c", "disk", ("c", LOCATION))
    assert site.job("c").order == order


@pytest.mark.parametrize("silent", ["a", "b"])
def test_both_ends_must_be_alive(site: Site, silent: str) -> None:
    registry = site.api._registry

    async def ask() -> None:
        registry._set_alive(registry.find(silent), False)
        await site.api.operate(Operation(instance_id="b", order=MOVE))

    with pytest.raises(NoWorker, match=f"'{silent}' has not been heard of for"):
        site.running.run(ask())
    assert site.events() == []


def test_the_keys_of_peers_are_shown_to_nobody(
    controller: Running, start_agent: StartAgent, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        site = Site(controller, start_agent)
        site.start("a")
        site.start("b")
        site.operate()
        with pytest.raises(InvalidQuery) as refused:
            site.operate(to="a")
    process = controller.call(lambda: site.api._registry.find("a"))
    shown = [
        caplog.text,
        repr(refused.value),
        repr(controller.call(site.api.workers)),
        repr(site.events()),
        repr(controller.counters()),
        repr(process.registration),
    ]
    assert not [text for text in shown if "a" * 32 in text or (b"a" * 32).hex() in text]
