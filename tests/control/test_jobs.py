"""The cache process's side of orders, by hand: each is begun once, and its end told until known."""

from __future__ import annotations

import logging

import pytest

from lmcache_kit.agent import operations as module
from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.operations import Jobs
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import Accepted, Compress, Outcome, PinInfo, Progress
from lmcache_kit.protocol.control import (
    AboutOrders,
    Began,
    Begin,
    Ended,
    FromAgent,
    Progressed,
    Registered,
    Rejected,
    Settled,
)
from tests.control.fakes import FakeClock, FakeEngine, FakeOperator

BEGIN = Begin("e1", 9.0, Compress(location="ram", method="cachegen"))
BEGAN = Began("e1", Accepted(12, 3))
DONE = Outcome("done", 12)


class Side:
    """Jobs of a pretended operator, and what they told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.operator = FakeOperator()
        self.woken = 0
        self.jobs = Jobs(self.operator, wake=self.wake, clock=self.clock)

    def wake(self) -> None:
        self.woken += 1

    def turn(self, room: int = 99) -> list[AboutOrders]:
        """What is told when the connection takes ``room`` messages."""
        told: list[AboutOrders] = []

        def tell(message: AboutOrders) -> bool:
            if len(told) < room:
                told.append(message)
                return True
            return False

        self.jobs.turn(tell)
        return told


@pytest.fixture
def side() -> Side:
    return Side()


def test_an_order_is_begun_with_its_deadline_and_answered(side: Side) -> None:
    side.jobs.begin(BEGIN)
    assert side.jobs.wait_s() == 0
    assert side.turn() == [BEGAN]
    assert side.operator.deadlines == [9.0]
    assert side.operator.jobs[0].order == BEGIN.order
    assert side.jobs.wait_s() is None


def test_an_order_that_is_said_again_is_begun_once_and_answered_again(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.jobs.begin(BEGIN)
    assert side.turn() == [BEGAN]
    side.jobs.begin(BEGIN)
    assert side.turn() == [BEGAN]
    assert len(side.operator.jobs) == 1


def test_an_order_whose_size_is_not_known_yet_is_answered_when_it_is(side: Side) -> None:
    side.operator.accepts = None
    side.jobs.begin(BEGIN)
    assert side.turn() == []
    side.jobs.begin(BEGIN)
    assert side.turn() == []
    job = side.operator.jobs[0]
    job.report(Progress())
    assert side.turn() == []
    assert side.jobs.wait_s() is None
    job.accepted = Accepted(12, 3)
    job.report(Progress(0, 3))
    assert side.woken == 2
    assert side.turn() == [BEGAN, Progressed("e1", Progress(0, 3))]
    side.jobs.begin(BEGIN)
    assert side.turn() == [BEGAN]
    assert len(side.operator.jobs) == 1


def test_an_order_that_ends_before_its_size_is_known_has_only_an_end(side: Side) -> None:
    side.operator.accepts = None
    failed = Outcome("failed", message="the source is gone")
    side.jobs.begin(BEGIN)
    side.turn()
    side.operator.jobs[0].finish(failed)
    assert side.turn() == [Ended("e1", failed)]
    side.jobs.begin(BEGIN)
    assert side.turn() == [Ended("e1", failed)]
    side.jobs.settled("e1")
    assert side.jobs.stats()["orders"] == 0


def test_an_end_is_told_until_it_is_acknowledged(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.turn()
    side.operator.jobs[0].finish(DONE)
    assert side.woken == 1
    assert side.turn() == [Ended("e1", DONE)]
    assert side.turn() == []
    side.clock.now += module.AGAIN_S
    assert side.turn() == [Ended("e1", DONE)]
    side.jobs.settled("e1")
    side.clock.now += module.AGAIN_S
    assert side.turn() == []
    assert side.jobs.stats()["orders"] == 0


def test_a_new_connection_is_told_at_once(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.operator.at_once = DONE
    assert side.turn() == [BEGAN, Ended("e1", DONE)]
    side.jobs.restart()
    assert side.jobs.wait_s() == 0
    assert side.turn() == [Ended("e1", DONE)]


def test_a_session_on_a_new_connection_tells_every_end_again(side: Side) -> None:
    engine, sent = FakeEngine(), list[FromAgent]()
    announcer = EventLog(engine.location)
    session = ControllerClient(
        [LocationFeed(engine, announcer)],
        Identity("a", b"i" * 16),
        jobs=side.jobs,
        clock=side.clock,
    )

    def turn() -> list[FromAgent]:
        sent.clear()
        session.turn(lambda message: not sent.append(message))  # type: ignore[func-returns-value]
        return [message for message in sent if isinstance(message, Ended)]

    side.operator.at_once = DONE
    session.handle(Registered(()))
    session.handle(BEGIN)
    assert turn() == [Ended("e1", DONE)]
    assert turn() == []
    session.restart()
    assert turn() == []
    session.handle(Registered(()))
    assert turn() == [Ended("e1", DONE)]
    session.handle(Settled("e1"))
    assert side.jobs.stats()["orders"] == 0


def test_an_acknowledgement_of_what_goes_on_is_not_believed(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.turn()
    side.jobs.settled("e1")
    side.operator.jobs[0].finish(DONE)
    assert side.turn() == [Ended("e1", DONE)]


def test_of_progress_only_the_last_is_told_and_not_too_often(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.turn()
    job = side.operator.jobs[0]
    for done in (1, 2):
        job.report(Progress(done, 3))
    assert side.turn() == [Progressed("e1", Progress(2, 3))]
    job.report(Progress(3, 3))
    assert side.turn() == []
    assert side.jobs.wait_s() == pytest.approx(module.PROGRESS_S)
    side.clock.now += module.PROGRESS_S
    assert side.turn() == [Progressed("e1", Progress(3, 3))]
    assert side.jobs.wait_s() is None


def test_only_the_first_end_is_told(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.turn()
    side.operator.jobs[0].finish(DONE)
    side.operator.jobs[0].finish(Outcome("failed"))
    assert side.turn() == [Ended("e1", DONE)]


def test_a_connection_that_takes_nothing_loses_nothing(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.operator.at_once = DONE
    assert side.turn(room=0) == []
    assert side.turn(room=1) == [BEGAN]
    assert side.turn(room=1) == [Ended("e1", DONE)]
    assert len(side.operator.jobs) == 1


def test_a_cancel_reaches_the_job(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.turn()
    side.jobs.cancel("e1")
    assert side.operator.jobs[0].cancelled.is_set()
    (ended,) = side.turn()
    assert isinstance(ended, Ended)
    assert ended.outcome.state == "cancelled"


def test_an_order_that_is_cancelled_before_it_began_never_begins(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.jobs.cancel("e1")
    (ended,) = side.turn()
    assert isinstance(ended, Ended)
    assert ended.outcome.message == "it had not begun"
    side.jobs.begin(BEGIN)
    side.turn()
    assert side.operator.jobs == []


def test_a_cancel_of_an_order_that_never_came_ends_it(side: Side) -> None:
    side.jobs.cancel("lost")
    (ended,) = side.turn()
    assert isinstance(ended, Ended)
    assert (ended.event_id, ended.outcome.state) == ("lost", "cancelled")
    side.jobs.settled("lost")
    assert side.jobs.stats()["orders"] == 0


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (UnknownName("method", "zip", ["cachegen"]), "unknown"),
        (InvalidQuery("no tokens", hint="Name some"), "invalid"),
        (ControlError("busy", hint="Wait"), "refused"),
    ],
)
def test_a_refusal_is_told_in_the_operators_words(
    side: Side, raised: ControlError, why: str
) -> None:
    side.operator.refusal = raised
    side.jobs.begin(BEGIN)
    (told,) = side.turn()
    assert isinstance(told, Rejected)
    assert (told.why, told.message) == (why, raised.message)
    if isinstance(raised, UnknownName):
        assert (told.kind, told.name, told.known) == ("method", "zip", ("cachegen",))
    else:
        assert told.hint == raised.hint
    assert side.jobs.stats()["orders"] == 0


def test_a_defect_of_the_operator_is_logged_and_told_as_one(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    side.operator.refusal = ZeroDivisionError("the secret is 42")
    side.jobs.begin(BEGIN)
    with caplog.at_level(logging.ERROR):
        (told,) = side.turn()
    assert isinstance(told, Rejected)
    assert told.why == "failed"
    assert "secret" not in told.message + told.hint
    assert "the secret is 42" in caplog.text


def test_a_cache_process_without_an_operator_refuses() -> None:
    jobs = Jobs(None)
    jobs.begin(BEGIN)
    told: list[AboutOrders] = []
    jobs.turn(lambda message: not told.append(message))  # type: ignore[func-returns-value]
    assert told == [Rejected("e1", "refused", "this cache process carries out no orders")]


def test_more_orders_than_can_be_kept_are_refused(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_JOBS", 2)
    for number in range(3):
        side.jobs.begin(Begin(f"e{number}", 9.0, BEGIN.order))
    kinds = [type(message) for message in side.turn()]
    assert kinds == [Began, Began, Rejected]


def test_an_end_that_nobody_ever_acknowledges_is_forgotten(side: Side) -> None:
    side.operator.at_once = DONE
    side.jobs.begin(BEGIN)
    side.turn()
    side.clock.now += module.KEEP_S + 1
    side.turn()
    assert side.jobs.stats()["orders"] == 0


def test_stopping_cancels_what_runs(side: Side) -> None:
    side.jobs.begin(BEGIN)
    side.turn()
    side.jobs.stop()
    assert side.operator.jobs[0].cancelled.is_set()


def test_a_message_without_measure_is_cut(side: Side) -> None:
    side.operator.at_once = Outcome("failed", message="x" * 10_000_000)
    side.jobs.begin(BEGIN)
    ended = side.turn()[-1]
    assert isinstance(ended, Ended)
    assert ended.outcome.message == "x" * 2000


def test_more_pins_than_fit_into_a_frame_are_counted(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PINS", 2)
    pin = PinInfo("p", "ram", 4, 1, 64, "", None)
    side.operator.at_once = Outcome("done", pins=(pin,) * 5)
    side.jobs.begin(BEGIN)
    ended = side.turn()[-1]
    assert isinstance(ended, Ended)
    assert (len(ended.outcome.pins), ended.outcome.state) == (2, "partial")
    assert ended.outcome.message == "3 more pins are not listed"
