"""Operations from a controller to agents and back, over connections that break."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import zmq

from lmcache_kit.controller.operations import RESEND_S, Operations
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import OperationInfo, PinList
from lmcache_kit.interfaces.operations import (
    Compress,
    ListPins,
    OperationRequest,
    OperationStatus,
    Pin,
    PinInfo,
    Progress,
    Scope,
)
from lmcache_kit.keys import pack_tokens
from lmcache_kit.protocol import control as wire
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import LOCATION, AheadClock, FakeExecutor, RunningFake
from tests.support.clocks import FakeClock
from tests.support.proxies import Proxy
from tests.support.waiting import eventually

TOKENS = pack_tokens(range(12))
COMPRESS = Compress(location=LOCATION, method="cachegen", tokens=TOKENS)
PIN = Pin(location=LOCATION, tokens=TOKENS, pin_id="", owner="me", ttl_s=60.0)


class Site:
    """A controller, its instance ``a``, and the executor there."""

    def __init__(self, controller: Running, executor: FakeExecutor) -> None:
        self.running = controller
        self.api = controller.controller.operations
        self.executor = executor

    def start(
        self, request: OperationRequest = COMPRESS, instance_id: str = "a", **more: Any
    ) -> OperationInfo:
        return self.running.run(self.api.start(instance_id, request, **more))

    def get(self, operation_id: str) -> OperationInfo:
        return self.running.call(self.api.get, operation_id)

    def all(self) -> list[OperationInfo]:
        return self.running.call(self.api.all)

    def wait(self, operation_id: str) -> OperationInfo:
        return self.running.run(self.api.wait(operation_id))

    def cancel(self, operation_id: str) -> OperationInfo:
        return self.running.run(self.api.cancel(operation_id))

    def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        return self.running.run(self.api.pins(instance_id, location))

    def operation(self, number: int = 0) -> RunningFake:
        eventually(lambda: len(self.executor.running) > number)
        return self.executor.running[number]


def set_up(controller: Running, start_agent: StartAgent, url: str = "", **options: Any) -> Site:
    executor = options.setdefault("executor", FakeExecutor())
    start_agent(url or controller.url, "a", **options)
    eventually(lambda: controller.counters()["instances_alive"] == 1)
    return Site(controller, executor)


@pytest.fixture
def site(controller: Running, start_agent: StartAgent) -> Site:
    return set_up(controller, start_agent)


def test_a_request_is_answered_when_it_is_accepted_and_followed_to_its_end(site: Site) -> None:
    taken = site.start(deadline_s=60.0)
    assert (taken.state, taken.tokens, taken.kind) == ("running", 12, "compress")
    operation = site.operation()
    assert operation.request == COMPRESS
    assert 50 < site.executor.deadlines[0] < 60
    operation.listener.progressed(Progress(1, 3, 300, 50))
    eventually(lambda: site.get(taken.operation_id).progress.chunks_done == 1)
    operation.end(OperationStatus("partial", 8, Progress(2, 3, 600, 100), "one chunk stays raw"))
    ended = site.wait(taken.operation_id)
    assert (ended.state, ended.tokens, ended.ratio) == ("partial", 8, 6.0)
    assert ended.message == "one chunk stays raw"
    assert ended.started_at
    assert ended.ended_at
    assert ended.created <= ended.started_at <= ended.ended_at <= ended.deadline
    assert site.all() == [ended]


def test_an_operation_that_ends_at_once_has_ended_when_it_is_answered(site: Site) -> None:
    site.executor.at_once = OperationStatus("done", 12)
    taken = site.start(PIN)
    ended = site.wait(taken.operation_id)
    assert (ended.state, ended.tokens) == ("done", 12)
    request = site.operation().request
    assert isinstance(request, Pin)
    assert (request.pin_id, request.owner, request.ttl_s) == (taken.operation_id, "me", 60.0)


def test_an_end_is_reported_at_once_and_not_at_the_next_heartbeat(
    controller: Running, start_agent: StartAgent
) -> None:
    site = set_up(controller, start_agent, heartbeat_s=60.0)
    operation_id = site.start(deadline_s=300.0).operation_id
    site.operation().end(OperationStatus("done", 12))
    assert site.wait(operation_id).state == "done"


def test_an_end_is_acknowledged_so_that_the_cache_process_forgets_it(
    controller: Running, start_agent: StartAgent
) -> None:
    executor = FakeExecutor()
    executor.at_once = OperationStatus("done", 12)
    agent, _ = start_agent(controller.url, executor=executor)
    eventually(lambda: agent.stats()["registered"])
    Site(controller, executor).start()
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
    site.executor.refusal = raised
    with pytest.raises(told) as info:
        site.start()
    assert type(info.value) is told
    if isinstance(raised, ControlError):
        assert str(info.value) == str(raised)
    if isinstance(info.value, UnknownName):
        assert (info.value.kind, info.value.known) == ("method", known)
    (event,) = site.all()
    assert event.state == "failed"


def test_as_many_tokens_as_a_request_may_name_arrive_and_more_are_refused(site: Site) -> None:
    most = Compress(location=LOCATION, method="cachegen", tokens=bytes(4 * 1024 * 1024))
    assert site.start(most).state == "running"
    assert site.operation().request == most
    over = Compress(location=LOCATION, method="cachegen", tokens=bytes(4 * 1024 * 1024 + 4))
    with pytest.raises(InvalidQuery, match="1048577 tokens are over the 1048576"):
        site.start(over)


@pytest.mark.parametrize(
    "endless",
    [
        ControlError("x" * 1_000_000, hint="y" * 1_000_000),
        UnknownName("z" * 1_000_000, "n" * 1_000_000, ["k" * 1000] * 5000),
    ],
)
def test_a_refusal_without_measure_is_cut(site: Site, endless: ControlError) -> None:
    site.executor.refusal = endless
    with pytest.raises(ControlError) as info:
        site.start()
    assert 2000 <= len(str(info.value)) < 40_000
    (event,) = site.all()
    assert len(event.message) <= 2000


def test_an_unknown_instance_or_location_lists_the_known_ones(site: Site) -> None:
    with pytest.raises(UnknownName, match=r"unknown instance 'b'\. Known: a"):
        site.start(instance_id="b")
    elsewhere = Compress(location="LocalDisk", method="cachegen")
    with pytest.raises(UnknownName, match=r"unknown location 'LocalDisk'\. Known: LocalCPUBackend"):
        site.start(elsewhere)
    assert site.all() == []


def test_an_agent_without_an_executor_refuses(controller: Running, start_agent: StartAgent) -> None:
    site = set_up(controller, start_agent, executor=None)
    with pytest.raises(ControlError, match="carries out no operations"):
        site.start()


def test_an_unknown_event_lists_the_known_ones(site: Site) -> None:
    operation_id = site.start().operation_id
    for ask in (site.get, site.wait, site.cancel):
        with pytest.raises(UnknownName, match=f"unknown event 'x'. Known: {operation_id}"):
            ask("x")


def test_a_cancel_ends_the_operation(site: Site) -> None:
    operation_id = site.start().operation_id
    cancelled = site.cancel(operation_id)
    assert (cancelled.state, cancelled.message) == ("cancelled", "as asked")
    assert site.operation().cancelled.is_set()
    assert site.cancel(operation_id) == cancelled


def test_what_has_ended_cannot_be_cancelled(site: Site) -> None:
    site.executor.at_once = OperationStatus("done", 12)
    operation_id = site.start().operation_id
    site.wait(operation_id)
    with pytest.raises(ControlError, match=f"event {operation_id} has ended: done"):
        site.cancel(operation_id)


def test_what_takes_too_long_expires_and_is_stopped_and_a_late_end_changes_nothing(
    site: Site,
) -> None:
    operation_id = site.start(deadline_s=0.3).operation_id
    assert site.wait(operation_id).state == "expired"
    operation = site.operation()
    assert operation.cancelled.wait(10)
    eventually(lambda: site.running.counters()["operation_ends_late_total"] == 1)
    ended = site.get(operation_id)
    assert (ended.state, ended.tokens) == ("expired", 0)
    assert site.running.counters()["operations_expired_total"] == 1
    assert site.running.counters()["operations_cancelled_total"] == 0


def test_the_same_key_starts_the_operation_once(site: Site) -> None:
    first = site.start(idempotency_key="k")
    again = site.start(idempotency_key="k")
    assert again.operation_id == first.operation_id
    assert len(site.executor.running) == 1
    with pytest.raises(ControlError, match="stands for another operation"):
        site.start(PIN, idempotency_key="k")


def test_requests_with_one_key_at_the_same_time_start_one_operation(site: Site) -> None:
    asked: list[Future[OperationInfo]] = [
        site.running.begin(site.api.start("a", COMPRESS, idempotency_key="k")) for _ in range(20)
    ]
    assert len({each.result(20).operation_id for each in asked}) == 1
    assert len(site.executor.running) == 1


# Connections that break, and lives that end.


def test_a_job_goes_on_over_a_cut_connection(controller: Running, start_agent: StartAgent) -> None:
    with Proxy(controller.port) as proxy:
        site = set_up(controller, start_agent, proxy.address)
        operation_id = site.start().operation_id
        proxy.cut()
        site.operation().end(OperationStatus("done", 12))
        assert site.wait(operation_id).state == "done"
    assert len(site.executor.running) == 1


def test_a_request_that_was_lost_is_sent_again_until_it_is_answered() -> None:
    clock = FakeClock()
    registry = Registry(clock=clock)
    sent: list[wire.FromController] = []
    operations = Operations(registry, lambda _, message: sent.append(message), clock=clock)
    registry.handle("c", wire.Register("a", b"i" * 16, 1.0, "", 60.0, (LOCATION,), (), ()))
    operation = operations.submit("a", COMPRESS)
    for _ in range(2):
        clock.now += RESEND_S
        operations.tick()
    requests = [each for each in sent if isinstance(each, wire.StartOperation)]
    assert [each.operation_id for each in requests] == [operation.operation_id] * 3
    assert requests[0].deadline_s > requests[1].deadline_s > requests[2].deadline_s
    operations.handle("c", wire.OperationStarted(operation.operation_id, Scope(12, 3)))
    clock.now += RESEND_S
    operations.tick()
    assert len(sent) == 3
    assert operations.get(operation.operation_id).state == "running"
    assert registry.counts["operation_messages_resent_total"] == 2


def test_a_request_to_a_process_that_takes_nothing_expires(
    controller: Running, start_agent: StartAgent
) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.connect(controller.url)
        registration = wire.Register("deaf", b"i" * 16, 1.0, "", 60.0, (LOCATION,), (), ())
        deaf.send(wire.encode(registration))
        eventually(lambda: controller.counters()["instances_alive"] == 1)
        site = Site(controller, FakeExecutor())
        with pytest.raises(
            DeadlineExceeded, match=r"'deaf' did not accept 'compress' within 0\.3 s"
        ):
            site.start(instance_id="deaf", deadline_s=0.3)
        (event,) = site.all()
        assert event.state == "expired"


def test_only_the_process_that_was_asked_can_say_how_it_went(
    site: Site, controller: Running
) -> None:
    operation_id = site.start().operation_id
    with zmq.Context() as context, context.socket(zmq.DEALER) as liar:
        liar.setsockopt(zmq.LINGER, 0)
        liar.connect(controller.url)
        liar.send(wire.encode(wire.Register("liar", b"l" * 16, 1.0, "", 5.0, (LOCATION,), (), ())))
        for report in (
            wire.OperationStarted(operation_id, Scope(99, 99)),
            wire.OperationProgressed(operation_id, Progress(99, 99)),
            wire.OperationRejected(operation_id, "failed", "no"),
            wire.OperationEnded(operation_id, OperationStatus("done", 99)),
        ):
            liar.send(wire.encode(report))
        eventually(lambda: controller.counters()["results_unasked_total"] == 4)
    event = site.get(operation_id)
    assert (event.state, event.tokens, event.progress.chunks) == ("running", 12, 3)


def test_the_end_of_an_unknown_operation_is_acknowledged(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    """A controller that was restarted knows no operations."""
    first = start_controller()
    executor = FakeExecutor()
    agent, _ = start_agent(first.url, executor=executor)
    eventually(lambda: first.counters()["instances_alive"] == 1)
    Site(first, executor).start()
    first.close()
    second = start_controller(first.port)
    eventually(lambda: second.counters()["instances_alive"] == 1)
    executor.running[0].end(OperationStatus("done", 12))
    eventually(lambda: agent.stats()["operations"] == 0)
    assert second.counters()["operation_ends_late_total"] == 1


def test_what_runs_in_a_process_that_ends_has_failed(
    controller: Running, start_agent: StartAgent
) -> None:
    executor = FakeExecutor()
    agent, _ = start_agent(controller.url, "a", executor=executor)
    eventually(lambda: controller.counters()["instances_alive"] == 1)
    site = Site(controller, executor)
    operation_id = site.start().operation_id
    executor.running[0].muted = True
    agent.stop()
    ended = site.wait(operation_id)
    assert ended.state == "failed"
    assert "'a' ended before the operation did" in ended.message


def test_an_agent_that_stops_cancels_what_runs_and_reports_it(
    controller: Running, start_agent: StartAgent
) -> None:
    executor = FakeExecutor()
    agent, _ = start_agent(controller.url, "a", executor=executor)
    eventually(lambda: controller.counters()["instances_alive"] == 1)
    site = Site(controller, executor)
    operation_id = site.start().operation_id
    agent.stop()
    assert executor.running[0].cancelled.is_set()
    assert site.wait(operation_id).state == "cancelled"


def test_what_runs_in_a_process_that_is_replaced_has_failed(
    site: Site, start_agent: StartAgent
) -> None:
    operation_id = site.start().operation_id
    start_agent(site.running.url, "a", executor=site.executor)
    assert site.wait(operation_id).state == "failed"


def test_a_process_that_is_not_heard_of_cannot_be_asked(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    clock = AheadClock()
    site = set_up(start_controller(registry=Registry(clock=clock)), start_agent)

    async def ask_the_silent() -> None:
        clock.ahead_s = 60.0
        await site.api.start("a", COMPRESS)

    with pytest.raises(NoWorker, match="'a' has not been heard of for"):
        site.running.run(ask_the_silent())
    assert site.executor.running == []


def test_a_controller_that_stops_fails_what_waits(site: Site) -> None:
    operation_id = site.start(deadline_s=3600.0).operation_id
    waiting = site.running.begin(site.api.wait(operation_id))
    site.running.run(site.running.controller.stop())
    assert waiting.result(20).message == "the controller is stopping"
    with pytest.raises(NoWorker, match="the controller is stopping"):
        site.start()


# Pins.

PINS = (
    PinInfo("p1", LOCATION, 12, 3, 960, "me", 59.5),
    PinInfo("p2", LOCATION, 4, 1, 320, "", None),
)


def test_pins_are_asked_of_the_cache_process_and_leave_no_event(site: Site) -> None:
    site.executor.at_once = OperationStatus("done", pins=PINS)
    found = site.pins("a", LOCATION)
    assert [each.pin for each in found.pins] == list(PINS)
    assert {each.instance_id for each in found.pins} == {"a"}
    assert site.executor.running[0].request == ListPins(location=LOCATION)
    assert site.all() == []


def test_pins_of_all_instances_name_those_that_do_not_answer(
    site: Site, start_agent: StartAgent
) -> None:
    site.executor.at_once = OperationStatus("done", pins=PINS[:1])
    start_agent(site.running.url, "b", executor=None)
    eventually(lambda: site.running.counters()["instances_alive"] == 2)
    found = site.pins()
    assert [(each.instance_id, each.pin.pin_id) for each in found.pins] == [("a", "p1")]
    assert found.unanswered == ("b",)
    with pytest.raises(ControlError, match="carries out no operations"):
        site.pins("b")


def test_pins_of_nobody_are_none_and_of_an_unknown_place_an_error(
    controller: Running, start_agent: StartAgent
) -> None:
    site = Site(controller, FakeExecutor())
    assert site.pins() == PinList(())
    set_up(controller, start_agent)
    with pytest.raises(UnknownName, match="unknown instance 'x'"):
        site.pins("x")
    for instance_id in (None, "a"):
        with pytest.raises(UnknownName, match=r"unknown location 'disk'\. Known: LocalCPUBackend"):
            site.pins(instance_id, "disk")
