"""Operations in a cache process: each starts once, and its end is reported until acknowledged."""

from __future__ import annotations

import logging

import pytest

from lmcache_kit.agent import operations as module
from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.operations import OperationRunner
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import Compress, OperationStatus, PinInfo, Progress, Scope
from lmcache_kit.protocol.control import (
    CancelOperation,
    FromAgent,
    OperationAcknowledged,
    OperationEnded,
    OperationProgressed,
    OperationRejected,
    OperationReport,
    OperationStarted,
    Registered,
    StartOperation,
)
from tests.control.fakes import FakeExecutor, FakeTier
from tests.support.clocks import FakeClock

START = StartOperation("e1", 9.0, Compress(location="ram", method="cachegen"))
STARTED = OperationStarted("e1", Scope(12, 3))
DONE = OperationStatus("done", 12)


class CacheProcess:
    """OperationRunner of a pretended operator, and what they sent."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.executor = FakeExecutor()
        self.woken = 0
        self.runner = OperationRunner(self.executor, wake=self.wake, clock=self.clock)

    def wake(self) -> None:
        self.woken += 1

    def turn(self, room: int = 99) -> list[OperationReport]:
        """Return the reports of a turn in which the connection takes ``room`` messages."""
        sent: list[OperationReport] = []

        def send(message: OperationReport) -> bool:
            if len(sent) < room:
                sent.append(message)
                return True
            return False

        self.runner.turn(send)
        return sent


@pytest.fixture
def process() -> CacheProcess:
    return CacheProcess()


def test_an_operation_is_started_with_its_deadline_and_answered(process: CacheProcess) -> None:
    process.runner.handle(START)
    assert process.runner.wait_s() == 0
    assert process.turn() == [STARTED]
    assert process.executor.deadlines == [9.0]
    assert process.executor.running[0].request == START.request
    assert process.runner.wait_s() is None


def test_a_request_that_comes_again_is_started_once_and_answered_again(
    process: CacheProcess,
) -> None:
    process.runner.handle(START)
    process.runner.handle(START)
    assert process.turn() == [STARTED]
    process.runner.handle(START)
    assert process.turn() == [STARTED]
    assert len(process.executor.running) == 1


def test_a_request_is_answered_when_it_is_accepted(process: CacheProcess) -> None:
    process.executor.scope = None
    process.runner.handle(START)
    assert process.turn() == []
    process.runner.handle(START)
    assert process.turn() == []
    running = process.executor.running[0]
    running.progress()
    assert process.turn() == []
    assert process.runner.wait_s() is None
    running.accept(12, 3)
    running.progress(0, 3)
    assert process.woken == 3
    assert process.turn() == [STARTED, OperationProgressed("e1", Progress(0, 3))]
    process.runner.handle(START)
    assert process.turn() == [STARTED]
    assert len(process.executor.running) == 1


def test_an_operation_that_ends_before_it_is_accepted_has_only_an_end(
    process: CacheProcess,
) -> None:
    process.executor.scope = None
    failed = OperationStatus("failed", message="the source is gone")
    process.runner.handle(START)
    process.turn()
    process.executor.running[0].end(failed)
    assert process.turn() == [OperationEnded("e1", failed)]
    process.runner.handle(START)
    assert process.turn() == [OperationEnded("e1", failed)]
    process.runner.handle(OperationAcknowledged("e1"))
    assert process.runner.stats()["operations"] == 0


def test_an_end_is_told_until_it_is_acknowledged(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.turn()
    woken = process.woken
    process.executor.running[0].end(DONE)
    assert process.woken == woken + 1
    assert process.turn() == [OperationEnded("e1", DONE)]
    assert process.turn() == []
    process.clock.now += module.RESEND_S
    assert process.turn() == [OperationEnded("e1", DONE)]
    process.runner.handle(OperationAcknowledged("e1"))
    process.clock.now += module.RESEND_S
    assert process.turn() == []
    assert process.runner.stats()["operations"] == 0


def test_a_new_connection_is_told_at_once(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.executor.at_once = DONE
    assert process.turn() == [STARTED, OperationEnded("e1", DONE)]
    process.runner.restart()
    assert process.runner.wait_s() == 0
    assert process.turn() == [OperationEnded("e1", DONE)]


def test_a_client_on_a_new_connection_tells_every_end_again(process: CacheProcess) -> None:
    engine, sent = FakeTier(), list[FromAgent]()
    log = EventLog(engine.location)
    client = ControllerClient(
        [LocationFeed(engine, log)],
        Identity("a", b"i" * 16),
        runner=process.runner,
        clock=process.clock,
    )

    def turn() -> list[FromAgent]:
        sent.clear()
        client.turn(lambda message: not sent.append(message))  # type: ignore[func-returns-value]
        return [message for message in sent if isinstance(message, OperationEnded)]

    process.executor.at_once = DONE
    client.handle(Registered(()))
    client.handle(START)
    assert turn() == [OperationEnded("e1", DONE)]
    assert turn() == []
    client.restart()
    assert turn() == []
    client.handle(Registered(()))
    assert turn() == [OperationEnded("e1", DONE)]
    client.handle(OperationAcknowledged("e1"))
    assert process.runner.stats()["operations"] == 0


def test_an_acknowledgement_of_what_goes_on_is_not_believed(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.turn()
    process.runner.handle(OperationAcknowledged("e1"))
    process.executor.running[0].end(DONE)
    assert process.turn() == [OperationEnded("e1", DONE)]


def test_of_progress_only_the_last_is_told_and_not_too_often(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.turn()
    running = process.executor.running[0]
    for done in (1, 2):
        running.progress(done, 3)
    assert process.turn() == [OperationProgressed("e1", Progress(2, 3))]
    running.progress(3, 3)
    assert process.turn() == []
    assert process.runner.wait_s() == pytest.approx(module.PROGRESS_S)
    process.clock.now += module.PROGRESS_S
    assert process.turn() == [OperationProgressed("e1", Progress(3, 3))]
    assert process.runner.wait_s() is None


def test_only_the_first_end_is_told(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.turn()
    process.executor.running[0].end(DONE)
    process.executor.running[0].end(OperationStatus("failed"))
    assert process.turn() == [OperationEnded("e1", DONE)]


def test_a_connection_that_takes_nothing_loses_nothing(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.executor.at_once = DONE
    assert process.turn(room=0) == []
    assert process.turn(room=1) == [STARTED]
    assert process.turn(room=1) == [OperationEnded("e1", DONE)]
    assert len(process.executor.running) == 1


def test_a_cancel_reaches_the_running_operation(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.turn()
    process.runner.handle(CancelOperation("e1"))
    assert process.executor.running[0].cancelled.is_set()
    (ended,) = process.turn()
    assert isinstance(ended, OperationEnded)
    assert ended.status.state == "cancelled"


def test_an_operation_that_is_cancelled_before_it_started_never_starts(
    process: CacheProcess,
) -> None:
    process.runner.handle(START)
    process.runner.handle(CancelOperation("e1"))
    (ended,) = process.turn()
    assert isinstance(ended, OperationEnded)
    assert ended.status.message == "it had not begun"
    process.runner.handle(START)
    process.turn()
    assert process.executor.running == []


def test_a_cancel_of_an_operation_that_never_came_ends_it(process: CacheProcess) -> None:
    process.runner.handle(CancelOperation("lost"))
    (ended,) = process.turn()
    assert isinstance(ended, OperationEnded)
    assert (ended.operation_id, ended.status.state) == ("lost", "cancelled")
    process.runner.handle(OperationAcknowledged("lost"))
    assert process.runner.stats()["operations"] == 0


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (UnknownName("method", "zip", ["cachegen"]), "unknown"),
        (InvalidQuery("no tokens", hint="Name some"), "invalid"),
        (ControlError("busy", hint="Wait"), "refused"),
    ],
)
def test_a_refusal_is_reported_in_the_executors_words(
    process: CacheProcess, raised: ControlError, why: str
) -> None:
    process.executor.refusal = raised
    process.runner.handle(START)
    (sent,) = process.turn()
    assert isinstance(sent, OperationRejected)
    assert (sent.reason, sent.message) == (why, raised.message)
    if isinstance(raised, UnknownName):
        assert (sent.kind, sent.name, sent.known) == ("method", "zip", ("cachegen",))
    else:
        assert sent.hint == raised.hint
    assert process.runner.stats()["operations"] == 0


def test_a_defect_of_the_executor_is_logged_and_reported_as_one(
    process: CacheProcess, caplog: pytest.LogCaptureFixture
) -> None:
    process.executor.refusal = ZeroDivisionError("the secret is 42")
    process.runner.handle(START)
    with caplog.at_level(logging.ERROR):
        (sent,) = process.turn()
    assert isinstance(sent, OperationRejected)
    assert sent.reason == "failed"
    assert "secret" not in sent.message + sent.hint
    assert "the secret is 42" in caplog.text


def test_a_cache_process_without_an_executor_refuses() -> None:
    runner = OperationRunner(None)
    runner.handle(START)
    sent: list[OperationReport] = []
    runner.turn(lambda message: not sent.append(message))  # type: ignore[func-returns-value]
    assert sent == [
        OperationRejected("e1", "refused", "this cache process carries out no operations")
    ]


def test_more_operations_than_can_be_kept_are_refused(
    process: CacheProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.runner = OperationRunner(process.executor, max_operations=2)
    for number in range(3):
        process.runner.handle(StartOperation(f"e{number}", 9.0, START.request))
    kinds = [type(message) for message in process.turn()]
    assert kinds == [OperationStarted, OperationStarted, OperationRejected]


def test_an_end_that_nobody_ever_acknowledges_is_dropped(process: CacheProcess) -> None:
    process.executor.at_once = DONE
    process.runner.handle(START)
    process.turn()
    process.clock.now += module.KEEP_S + 1
    process.turn()
    assert process.runner.stats()["operations"] == 0


def test_stopping_cancels_what_runs(process: CacheProcess) -> None:
    process.runner.handle(START)
    process.turn()
    process.runner.stop()
    assert process.executor.running[0].cancelled.is_set()


def test_a_message_without_measure_is_cut(process: CacheProcess) -> None:
    process.executor.at_once = OperationStatus("failed", message="x" * 10_000_000)
    process.runner.handle(START)
    ended = process.turn()[-1]
    assert isinstance(ended, OperationEnded)
    assert ended.status.message == "x" * 2000


def test_more_pins_than_fit_into_a_frame_are_counted(
    process: CacheProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PINS", 2)
    pin = PinInfo("p", "ram", 4, 1, 64, "", None)
    process.executor.at_once = OperationStatus("done", pins=(pin,) * 5)
    process.runner.handle(START)
    ended = process.turn()[-1]
    assert isinstance(ended, OperationEnded)
    assert (len(ended.status.pins), ended.status.state) == (2, "partial")
    assert ended.status.message == "3 more pins are not listed"
