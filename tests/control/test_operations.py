"""Orders from a real controller to real agents and back, over connections that break."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

import pytest
import zmq

from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import OperationInfo, Operation, PinList
from lmcache_kit.interfaces.operations import (
    Scope,
    Compress,
    ListPins,
    OperationRequest,
    OperationStatus,
    Pin,
    PinInfo,
    Progress,
)
from lmcache_kit.keys import pack_tokens
from lmcache_kit.protocol import control as wire
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import LOCATION, FakeJob, FakeOperator, Proxy, eventually

TOKENS = pack_tokens(range(12))
COMPRESS = Compress(location=LOCATION, method="cachegen", tokens=TOKENS)
PIN = Pin(location=LOCATION, tokens=TOKENS, pin_id="", owner="me", ttl_s=60.0)


class Site:
    """A controller, an instance ``a`` of it, and the operator there."""

    def __init__(self, controller: Running, operator: FakeOperator) -> None:
        self.running = controller
        self.api = controller.controller
        self.operator = operator

    def operate(
        self, order: OperationRequest = COMPRESS, instance_id: str = "a", **more: Any
    ) -> OperationInfo:
        return self.running.run(self.begin(order, instance_id, **more))

    def begin(
        self, order: OperationRequest = COMPRESS, instance_id: str = "a", **more: Any
    ) -> Awaitable[OperationInfo]:
        return self.api.operate(Operation(instance_id=instance_id, order=order, **more))

    def event(self, event_id: str) -> OperationInfo:
        return self.running.call(self.api.event, event_id)

    def ended(self, event_id: str) -> OperationInfo:
        return self.running.run(self.api.ended(event_id))

    def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        return self.running.run(self.api.pins(instance_id, location))

    def job(self, number: int = 0) -> FakeJob:
        eventually(lambda: len(self.operator.jobs) > number)
        return self.operator.jobs[number]


def begin(controller: Running, start_agent: StartAgent, url: str = "", **options: Any) -> Site:
    operator = options.setdefault("operator", FakeOperator())
    start_agent(url or controller.url, "a", **options)
    eventually(lambda: controller.counters()["instances_alive"] == 1)
    return Site(controller, operator)


@pytest.fixture
def site(controller: Running, start_agent: StartAgent) -> Site:
    return begin(controller, start_agent)


def test_an_order_is_answered_when_it_is_taken_on_and_followed_to_its_end(site: Site) -> None:
    taken = site.operate(deadline_s=60.0)
    assert (taken.state, taken.tokens, taken.operation) == ("running", 12, "compress")
    job = site.job()
    assert job.order == COMPRESS
    assert 50 < site.operator.deadlines[0] < 60
    job.report(Progress(1, 3, 300, 50))
    eventually(lambda: site.event(taken.event_id).parts[0].progress.chunks_done == 1)
    job.finish(OperationStatus("partial", 8, Progress(2, 3, 600, 100), "one chunk stays raw"))
    ended = site.ended(taken.event_id)
    assert (ended.state, ended.tokens, ended.ratio) == ("partial", 8, 6.0)
    assert ended.message == "one chunk stays raw"
    assert ended.started
    assert ended.ended
    assert ended.created <= ended.started <= ended.ended <= ended.deadline
    assert site.running.call(site.api.events) == [ended]


def test_an_order_that_ends_at_once_has_ended_when_it_is_answered(site: Site) -> None:
    site.operator.at_once = OperationStatus("done", 12)
    taken = site.operate(PIN)
    ended = site.ended(taken.event_id)
    assert (ended.state, ended.tokens) == ("done", 12)
    order = site.job().order
    assert isinstance(order, Pin)
    assert (order.pin_id, order.owner, order.ttl_s) == (taken.event_id, "me", 60.0)


def test_an_end_is_told_at_once_and_not_at_the_next_heartbeat(
    controller: Running, start_agent: StartAgent
) -> None:
    site = begin(controller, start_agent, heartbeat_s=60.0)
    event_id = site.operate(deadline_s=300.0).event_id
    time.sleep(0.2)  # the agent sleeps as well by now
    site.job().finish(OperationStatus("done", 12))
    assert site.ended(event_id).state == "done"


def test_an_end_is_acknowledged_so_that_the_cache_process_forgets_it(
    controller: Running, start_agent: StartAgent
) -> None:
    operator = FakeOperator()
    operator.at_once = OperationStatus("done", 12)
    agent, _ = start_agent(controller.url, operator=operator)
    eventually(lambda: agent.stats()["registered"])
    Site(controller, operator).operate()
    eventually(lambda: agent.stats()["operations"] == 0)


@pytest.mark.parametrize(
    ("raised", "told", "known"),
    [
        (UnknownName("method", "zip", ["cachegen"]), UnknownName, ["cachegen"]),
        (InvalidQuery("no tokens", hint="Name some"), InvalidQuery, None),
        (ControlError("busy", hint="Wait"), ControlError, None),
        (ZeroDivisionError(), OperationFailed, None),
    ],
)
def test_a_refusal_is_raised_as_what_it_was(
    site: Site, raised: Exception, told: type[ControlError], known: list[str] | None
) -> None:
    site.operator.refusal = raised
    with pytest.raises(told) as info:
        site.operate()
    assert type(info.value) is told
    if isinstance(raised, ControlError):
        assert str(info.value) == str(raised)
    if isinstance(info.value, UnknownName):
        assert (info.value.kind, info.value.known) == ("method", known)
    (event,) = site.running.call(site.api.events)
    assert event.state == "failed"


def test_as_many_tokens_as_an_order_may_name_arrive_and_more_are_refused(site: Site) -> None:
    most = Compress(location=LOCATION, method="cachegen", tokens=bytes(4 * 1024 * 1024))
    assert site.operate(most).state == "running"
    assert site.job().order == most
    over = Compress(location=LOCATION, method="cachegen", tokens=bytes(4 * 1024 * 1024 + 4))
    with pytest.raises(InvalidQuery, match="1048577 tokens are over the 1048576"):
        site.operate(over)


@pytest.mark.parametrize(
    "endless",
    [
        ControlError("x" * 1_000_000, hint="y" * 1_000_000),
        UnknownName("z" * 1_000_000, "n" * 1_000_000, ["k" * 1000] * 5000),
    ],
)
def test_a_refusal_without_measure_is_cut(site: Site, endless: ControlError) -> None:
    site.operator.refusal = endless
    with pytest.raises(ControlError) as info:
        site.operate()
    assert 2000 <= len(str(info.value)) < 40_000
    (event,) = site.running.call(site.api.events)
    assert len(event.message) <= 2000


def test_an_unknown_instance_or_location_lists_the_known_ones(site: Site) -> None:
    with pytest.raises(UnknownName, match=r"unknown instance 'b'\. Known: a"):
        site.operate(instance_id="b")
    elsewhere = Compress(location="LocalDisk", method="cachegen")
    with pytest.raises(UnknownName, match=r"unknown location 'LocalDisk'\. Known: LocalCPUBackend"):
        site.operate(elsewhere)
    assert site.running.call(site.api.events) == []


def test_an_agent_without_an_operator_refuses(controller: Running, start_agent: StartAgent) -> None:
    site = begin(controller, start_agent, operator=None)
    with pytest.raises(ControlError, match="carries out no orders"):
        site.operate()


def test_an_unknown_event_lists_the_known_ones(site: Site) -> None:
    event_id = site.operate().event_id
    for ask in (site.event, site.ended, lambda name: site.running.run(site.api.cancel(name))):
        with pytest.raises(UnknownName, match=f"unknown event 'x'. Known: {event_id}"):
            ask("x")


def test_a_cancel_ends_the_order(site: Site) -> None:
    event_id = site.operate().event_id
    cancelled = site.running.run(site.api.cancel(event_id))
    assert (cancelled.state, cancelled.message) == ("cancelled", "as asked")
    assert site.job().cancelled.is_set()
    assert site.running.run(site.api.cancel(event_id)) == cancelled


def test_what_has_ended_cannot_be_cancelled(site: Site) -> None:
    site.operator.at_once = OperationStatus("done", 12)
    event_id = site.operate().event_id
    site.ended(event_id)
    with pytest.raises(ControlError, match=f"event {event_id} has ended: done"):
        site.running.run(site.api.cancel(event_id))


def test_what_takes_too_long_expires_and_is_stopped_and_a_late_end_changes_nothing(
    site: Site,
) -> None:
    event_id = site.operate(deadline_s=0.3).event_id
    assert site.ended(event_id).state == "expired"
    job = site.job()
    assert job.cancelled.wait(10)
    eventually(lambda: site.running.counters()["operation_ends_late_total"] == 1)
    ended = site.event(event_id)
    assert (ended.state, ended.tokens) == ("expired", 0)
    assert site.running.counters()["operations_expired_total"] == 1
    assert site.running.counters()["operations_cancelled_total"] == 0


def test_the_same_key_gives_the_order_once(site: Site) -> None:
    first = site.operate(idempotency_key="k")
    again = site.operate(idempotency_key="k")
    assert again.event_id == first.event_id
    assert len(site.operator.jobs) == 1
    with pytest.raises(ControlError, match="stands for another operation"):
        site.operate(PIN, idempotency_key="k")


def test_requests_with_one_key_at_the_same_time_give_the_order_once(site: Site) -> None:
    asked: list[Future[OperationInfo]] = [
        site.running.begin(site.begin(idempotency_key="k")) for _ in range(20)
    ]
    assert len({each.result(20).event_id for each in asked}) == 1
    assert len(site.operator.jobs) == 1


# Connections that break, and lives that end.


def test_a_job_goes_on_over_a_cut_connection(controller: Running, start_agent: StartAgent) -> None:
    with Proxy(controller.port) as proxy:
        site = begin(controller, start_agent, proxy.url)
        event_id = site.operate().event_id
        proxy.cut()
        site.job().finish(OperationStatus("done", 12))
        assert site.ended(event_id).state == "done"
    assert len(site.operator.jobs) == 1


def test_an_order_that_was_lost_on_its_way_is_given_again(
    controller: Running, start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = begin(controller, start_agent)
    operations = site.api._operations
    really, lost = operations._send, list[wire.FromController]()

    def lose_the_first(connection: Any, message: wire.FromController) -> None:
        lost.append(message)
        if len(lost) > 1:
            really(connection, message)

    monkeypatch.setattr(operations, "_send", lose_the_first)
    assert site.operate().state == "running"
    assert len(site.operator.jobs) == 1
    assert controller.counters()["operation_messages_resent_total"] == 1


def test_an_order_to_a_process_that_takes_nothing_expires(
    controller: Running, start_agent: StartAgent
) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.connect(controller.url)
        said = wire.Register("deaf", b"i" * 16, 1.0, "", 60.0, (LOCATION,), (), ())
        deaf.send(wire.encode(said))
        eventually(lambda: controller.counters()["instances_alive"] == 1)
        site = Site(controller, FakeOperator())
        with pytest.raises(
            DeadlineExceeded, match=r"'deaf' did not take on 'compress' within 0\.3 s"
        ):
            site.operate(instance_id="deaf", deadline_s=0.3)
        (event,) = controller.call(controller.controller.operations.all)
        assert event.state == "expired"


def test_only_the_process_that_was_asked_can_say_how_it_went(
    site: Site, controller: Running
) -> None:
    event_id = site.operate().event_id
    with zmq.Context() as context, context.socket(zmq.DEALER) as liar:
        liar.setsockopt(zmq.LINGER, 0)
        liar.connect(controller.url)
        liar.send(wire.encode(wire.Register("liar", b"l" * 16, 1.0, "", 5.0, (LOCATION,), (), ())))
        for said in (
            wire.OperationStarted(event_id, Scope(99, 99)),
            wire.OperationProgressed(event_id, Progress(99, 99)),
            wire.OperationRejected(event_id, "failed", "no"),
            wire.OperationEnded(event_id, OperationStatus("done", 99)),
        ):
            liar.send(wire.encode(said))
        eventually(lambda: controller.counters()["results_unasked_total"] == 4)
    event = site.event(event_id)
    assert (event.state, event.tokens, event.parts[0].progress.chunks) == ("running", 12, 3)


def test_an_end_of_an_order_that_nobody_knows_is_acknowledged(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    """A controller that was restarted has forgotten what was ordered."""
    first = start_controller()
    operator = FakeOperator()
    agent, _ = start_agent(first.url, operator=operator)
    eventually(lambda: first.counters()["instances_alive"] == 1)
    Site(first, operator).operate()
    first.close()
    second = start_controller(first.port)
    eventually(lambda: second.counters()["instances_alive"] == 1)
    operator.jobs[0].finish(OperationStatus("done", 12))
    eventually(lambda: agent.stats()["operations"] == 0)
    assert second.counters()["operation_ends_late_total"] == 1


def test_what_runs_in_a_process_that_ends_has_failed(
    controller: Running, start_agent: StartAgent
) -> None:
    operator = FakeOperator()
    agent, _ = start_agent(controller.url, "a", operator=operator)
    eventually(lambda: controller.counters()["instances_alive"] == 1)
    site = Site(controller, operator)
    event_id = site.operate().event_id
    operator.jobs[0].finish = lambda outcome: None
    agent.stop()
    ended = site.ended(event_id)
    assert ended.state == "failed"
    assert "'a' ended before it was done" in ended.message


def test_an_agent_that_stops_cancels_what_runs_and_tells_so(
    controller: Running, start_agent: StartAgent
) -> None:
    operator = FakeOperator()
    agent, _ = start_agent(controller.url, "a", operator=operator)
    eventually(lambda: controller.counters()["instances_alive"] == 1)
    site = Site(controller, operator)
    event_id = site.operate().event_id
    agent.stop()
    assert operator.jobs[0].cancelled.is_set()
    assert site.ended(event_id).state == "cancelled"


def test_what_runs_in_a_process_that_is_replaced_has_failed(
    site: Site, start_agent: StartAgent
) -> None:
    event_id = site.operate().event_id
    start_agent(site.running.url, "a", operator=site.operator)
    assert site.ended(event_id).state == "failed"


def test_a_process_that_is_not_heard_of_cannot_be_asked(site: Site) -> None:
    registry = site.api._registry

    async def ask_the_silent() -> None:
        registry._set_alive(registry.find("a"), False)
        await site.api.operate(Operation(instance_id="a", order=COMPRESS))

    with pytest.raises(NoWorker, match="'a' has not been heard of for"):
        site.running.run(ask_the_silent())
    assert site.operator.jobs == []


def test_a_controller_that_stops_tells_whoever_waits(site: Site) -> None:
    event_id = site.operate().event_id
    waiting = site.running.begin(site.api.ended(event_id))
    began = time.monotonic()
    site.running.run(site.api.stop())
    assert waiting.result(5).message == "the controller is stopping"
    assert time.monotonic() - began < 5
    with pytest.raises(NoWorker, match="the controller is stopping"):
        site.operate()


# Pins.

PINS = (
    PinInfo("p1", LOCATION, 12, 3, 960, "me", 59.5),
    PinInfo("p2", LOCATION, 4, 1, 320, "", None),
)


def test_pins_are_asked_of_the_cache_process_and_leave_no_event(site: Site) -> None:
    site.operator.at_once = OperationStatus("done", pins=PINS)
    found = site.pins("a", LOCATION)
    assert [each.pin for each in found.pins] == list(PINS)
    assert {each.instance_id for each in found.pins} == {"a"}
    assert site.operator.jobs[0].order == ListPins(location=LOCATION)
    assert site.running.call(site.api.events) == []


def test_pins_of_all_instances_name_those_that_do_not_answer(
    site: Site, start_agent: StartAgent
) -> None:
    site.operator.at_once = OperationStatus("done", pins=PINS[:1])
    start_agent(site.running.url, "b", operator=None)
    eventually(lambda: site.running.counters()["instances_alive"] == 2)
    found = site.pins()
    assert [(each.instance_id, each.pin.pin_id) for each in found.pins] == [("a", "p1")]
    assert found.unanswered == ("b",)
    with pytest.raises(ControlError, match="carries out no orders"):
        site.pins("b")


def test_pins_of_nobody_are_none_and_of_an_unknown_place_an_error(
    controller: Running, start_agent: StartAgent
) -> None:
    site = Site(controller, FakeOperator())
    assert site.pins() == PinList(())
    begin(controller, start_agent)
    with pytest.raises(UnknownName, match="unknown instance 'x'"):
        site.pins("x")
    for instance_id in (None, "a"):
        with pytest.raises(UnknownName, match=r"unknown location 'disk'\. Known: LocalCPUBackend"):
            site.pins(instance_id, "disk")
