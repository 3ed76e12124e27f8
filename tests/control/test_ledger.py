"""The ledger: every event ends in exactly one way, by its deadline, and is kept for a while."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from lmcache_kit.controller import operation_log as ledgers
from lmcache_kit.controller.operation_log import Event, OperationLog
from lmcache_kit.controller.registry import Process
from lmcache_kit.errors import ControlError, DeadlineExceeded, NoWorker, UnknownName
from lmcache_kit.interfaces.frontend import Operation
from lmcache_kit.interfaces.operations import (
    Accepted,
    Compress,
    ListPins,
    Order,
    Outcome,
    Pin,
    Progress,
)
from lmcache_kit.protocol.control import Register, WorkerPort
from tests.control.fakes import FakeClock

PROCESS = Process(
    Register("a", b"i" * 16, 1.0, "", 1.0, ("ram",), (WorkerPort(1, 0), WorkerPort(0, 0)), ()),
    connection=1,
    ip="",
)
COMPRESS = Compress(location="ram", method="cachegen", tokens=b"1234" * 12)


class Book:
    """A ledger, and time."""

    def __init__(self, **limits: Any) -> None:
        self.clock = FakeClock()
        self.counts: Counter[str] = Counter()
        self.ledger = OperationLog(self.counts, clock=self.clock, wall=self.clock, **limits)

    def open(self, order: Order = COMPRESS, **more: Any) -> Event:
        return self.ledger.open(operation(order, **more), PROCESS)


def operation(order: Order = COMPRESS, **more: Any) -> Operation:
    return Operation(instance_id="a", order=order, **more)


@pytest.fixture
def book() -> Book:
    return Book()


def test_an_event_is_queued_then_running_then_done(book: Book) -> None:
    event = book.open()
    assert event.info().state == "queued"
    book.clock.now += 1
    book.ledger.accept(event, Accepted(tokens=12, chunks=3))
    assert (event.info().state, event.info().tokens) == ("running", 12)
    book.clock.now += 1
    book.ledger.finish(event, Outcome("done", 8, Progress(2, 3, 600, 100)))
    info = event.info()
    assert (info.state, info.tokens, info.ratio) == ("done", 8, 6.0)
    assert (info.created, info.started, info.ended) == (1000.0, 1001.0, 1002.0)
    assert info.parts[0].worker_ids == (0, 1)
    assert info.parts[0].progress == Progress(2, 3, 600, 100)


def test_only_the_first_end_counts(book: Book) -> None:
    event = book.open()
    book.ledger.finish(event, Outcome("partial", 4, message="the rest was gone"))
    before = event.info()
    book.ledger.finish(event, Outcome("done", 12))
    book.ledger.fail(event, NoWorker("gone"))
    book.clock.now += 10_000
    assert book.ledger.expire() == []
    assert event.info() == before
    assert book.counts["operations_partial_total"] == 1
    assert book.counts["operations_done_total"] == book.counts["operations_failed_total"] == 0


def test_what_does_not_end_by_its_deadline_expires_there(book: Book) -> None:
    event = book.open(deadline_s=5.0)
    book.ledger.accept(event, Accepted(12, 3))
    book.clock.now += 4.9
    assert book.ledger.expire() == []
    book.clock.now += 0.1
    assert book.ledger.expire() == [event]
    assert event.info().state == "expired"
    assert "did not finish 'compress' within 5 s" in event.info().message
    assert event.ended.is_set()


def test_one_that_nobody_took_on_in_time_is_refused_as_late(book: Book) -> None:
    event = book.open(deadline_s=5.0)
    book.clock.now += 5
    book.ledger.expire()
    assert isinstance(event.refusal, DeadlineExceeded)
    assert "did not take on 'compress' within 5 s" in event.refusal.message
    assert event.answered.is_set()


def test_one_that_nobody_takes_on_expires_long_before_a_far_deadline(book: Book) -> None:
    event, taken = book.open(), book.open()
    book.ledger.accept(taken, Accepted(12, 3))
    book.clock.now += ledgers.TAKE_S
    assert book.ledger.expire() == [event]
    assert "did not take on 'compress' within 10 s" in event.info().message


@pytest.mark.parametrize(
    ("order", "seconds"),
    [(COMPRESS, ledgers.LONG_S), (Pin(location="ram", pin_id=""), ledgers.QUICK_S)],
)
def test_an_order_without_a_deadline_gets_that_of_its_kind(
    book: Book, order: Order, seconds: float
) -> None:
    event = book.open(order)
    assert event.info().deadline == 1000.0 + seconds
    assert event.begin
    assert event.begin.deadline_s == seconds


def test_a_pin_without_a_name_gets_that_of_its_event(book: Book) -> None:
    event = book.open(Pin(location="ram", pin_id=""))
    assert event.begin
    assert isinstance(event.begin.order, Pin)
    assert event.begin.order.pin_id == event.event_id


def test_the_same_key_and_order_are_the_same_event(book: Book) -> None:
    event = book.open(idempotency_key="k")
    book.ledger.finish(event, Outcome("done", 12))
    assert book.ledger.same(operation(idempotency_key="k")) is event
    assert book.ledger.same(operation(idempotency_key="l")) is None
    assert book.ledger.same(operation()) is None


@pytest.mark.parametrize(
    "other",
    [
        operation(msgspec.structs.replace(COMPRESS, tokens=None), idempotency_key="k"),
        operation(msgspec.structs.replace(COMPRESS, cache_salt="s"), idempotency_key="k"),
        operation(deadline_s=1.0, idempotency_key="k"),
        Operation(instance_id="b", order=COMPRESS, idempotency_key="k"),
    ],
)
def test_the_same_key_for_another_order_is_a_conflict(book: Book, other: Operation) -> None:
    event = book.open(idempotency_key="k")
    with pytest.raises(ControlError, match=f"stands for another operation: event {event.event_id}"):
        book.ledger.same(other)


def test_the_key_of_a_refused_order_may_be_tried_again(book: Book) -> None:
    event = book.open(idempotency_key="k")
    book.ledger.refuse(event, UnknownName("method", "zip", ["cachegen"]))
    assert book.ledger.same(operation(idempotency_key="k")) is None
    assert (event.info().state, event.info().message) == ("failed", "unknown method 'zip'")


def test_the_key_of_an_order_whose_process_ended_before_it_began_may_be_tried_again(
    book: Book,
) -> None:
    waiting, begun = book.open(idempotency_key="k"), book.open(idempotency_key="l")
    book.ledger.accept(begun, Accepted(12, 3))
    for event in (waiting, begun):
        book.ledger.fail(event, NoWorker("gone"))
    assert book.ledger.same(operation(idempotency_key="k")) is None
    assert book.ledger.same(operation(idempotency_key="l")) is begun
    assert (waiting.refusal is None, begun.refusal is None) == (False, True)


def test_finished_events_are_kept_for_a_time_with_their_keys() -> None:
    book = Book(keep_s=60.0)
    event = book.open(idempotency_key="k")
    running = book.open(deadline_s=1000.0)
    book.ledger.finish(event, Outcome("done"))
    book.clock.now += 59
    book.ledger.expire()
    assert book.ledger.find(event.event_id) is event
    book.clock.now += 1
    book.ledger.expire()
    assert book.ledger.all() == [running]
    assert book.ledger.same(operation(idempotency_key="k")) is None


def test_no_more_finished_events_are_kept_than_agreed() -> None:
    book = Book(keep=3)
    events = [book.open() for _ in range(5)]
    for event in events:
        book.ledger.finish(event, Outcome("done"))
    book.ledger.expire()
    assert book.ledger.all() == [events[4], events[3], events[2]]


def test_an_unknown_event_lists_the_latest_ones(book: Book) -> None:
    events = [book.open() for _ in range(25)]
    with pytest.raises(UnknownName, match="unknown event 'x'") as info:
        book.ledger.find("x")
    assert info.value.known == [event.event_id for event in reversed(events[5:])]


def test_more_orders_than_allowed_at_once_are_refused() -> None:
    book = Book(max_active=2)
    first = book.open()
    book.open()
    with pytest.raises(ControlError, match="2 operations are under way"):
        book.open()
    book.ledger.finish(first, Outcome("done"))
    book.open()


def test_more_tokens_than_allowed_in_orders_that_wait_are_refused(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "MAX_WAITING_BYTES", 100)
    first = book.open()
    book.open()
    with pytest.raises(ControlError, match="under way"):
        book.open()
    book.ledger.accept(first, Accepted(12, 3))
    book.open()


def test_asking_for_pins_is_no_event(book: Book) -> None:
    event = book.open(ListPins(location="ram"))
    assert book.ledger.all() == []
    assert book.ledger.active(event.event_id) is event
    book.ledger.finish(event, Outcome("done"))
    assert event.ended.is_set()
    assert book.counts["operations_total"] == book.counts["operations_done_total"] == 0
