"""The operation log: every operation has one end, by its deadline, and is kept for a while."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import msgspec
import pytest

from lmcache_kit.controller import operation_log
from lmcache_kit.controller.operation_log import Operation, OperationLog
from lmcache_kit.controller.registry import Process
from lmcache_kit.errors import ControlError, DeadlineExceeded, NoWorker, UnknownName
from lmcache_kit.interfaces.operations import (
    Compress,
    ListPins,
    OperationRequest,
    OperationStatus,
    Pin,
    Progress,
    Scope,
)
from lmcache_kit.protocol.control import Register, WorkerPort
from tests.support.clocks import FakeClock

PROCESS = Process(
    Register("a", b"i" * 16, 1.0, "", 1.0, ("ram",), (WorkerPort(1, 0), WorkerPort(0, 0)), ()),
    connection=1,
    ip="",
)
COMPRESS = Compress(location="ram", method="cachegen", tokens=b"1234" * 12)


class Book:
    """An operation log, and time."""

    def __init__(self, **limits: Any) -> None:
        self.clock = FakeClock()
        self.counts: Counter[str] = Counter()
        self.log = OperationLog(self.counts, clock=self.clock, wall=self.clock, **limits)

    def open(self, request: OperationRequest = COMPRESS, **more: Any) -> Operation:
        return self.log.open(request, PROCESS, **more)

    def same(self, key: str | None, request: OperationRequest = COMPRESS) -> Operation | None:
        return self.log.same(key, "a", request)


@pytest.fixture
def book() -> Book:
    return Book()


def test_an_operation_is_queued_then_running_then_done(book: Book) -> None:
    operation = book.open()
    assert operation.info().state == "queued"
    book.clock.now += 1
    book.log.accept(operation, Scope(tokens=12, chunks=3))
    assert (operation.info().state, operation.info().tokens) == ("running", 12)
    book.clock.now += 1
    book.log.finish(operation, OperationStatus("done", 8, Progress(2, 3, 600, 100)))
    info = operation.info()
    assert (info.state, info.tokens, info.ratio) == ("done", 8, 6.0)
    assert (info.created, info.started_at, info.ended_at) == (1000.0, 1001.0, 1002.0)
    assert info.worker_ids == (0, 1)
    assert info.progress == Progress(2, 3, 600, 100)


def test_only_the_first_end_counts(book: Book) -> None:
    operation = book.open()
    book.log.finish(operation, OperationStatus("partial", 4, message="the rest was gone"))
    before = operation.info()
    book.log.finish(operation, OperationStatus("done", 12))
    book.log.fail(operation, NoWorker("gone"))
    book.clock.now += 10_000
    assert book.log.expire() == []
    assert operation.info() == before
    assert book.counts["operations_partial_total"] == 1
    assert book.counts["operations_done_total"] == book.counts["operations_failed_total"] == 0


def test_what_does_not_end_by_its_deadline_expires_there(book: Book) -> None:
    operation = book.open(deadline_s=5.0)
    book.log.accept(operation, Scope(12, 3))
    book.clock.now += 4.9
    assert book.log.expire() == []
    book.clock.now += 0.1
    assert book.log.expire() == [operation]
    assert operation.info().state == "expired"
    assert "did not finish 'compress' within 5 s" in operation.info().message
    assert operation.ended.is_set()


def test_one_that_nobody_took_on_in_time_is_refused_as_late(book: Book) -> None:
    operation = book.open(deadline_s=5.0)
    book.clock.now += 5
    book.log.expire()
    assert isinstance(operation.refusal, DeadlineExceeded)
    assert "did not accept 'compress' within 5 s" in operation.refusal.message
    assert operation.answered.is_set()


def test_one_that_nobody_takes_on_expires_long_before_a_far_deadline(book: Book) -> None:
    operation, taken = book.open(), book.open()
    book.log.accept(taken, Scope(12, 3))
    book.clock.now += operation_log.ACCEPT_S
    assert book.log.expire() == [operation]
    assert "did not accept 'compress' within 10 s" in operation.info().message


@pytest.mark.parametrize(
    ("wanted", "seconds"),
    [(COMPRESS, operation_log.LONG_S), (Pin(location="ram", pin_id=""), operation_log.SHORT_S)],
)
def test_a_request_without_a_deadline_gets_that_of_its_kind(
    book: Book, wanted: OperationRequest, seconds: float
) -> None:
    operation = book.open(wanted)
    assert operation.info().deadline == 1000.0 + seconds
    assert operation.start
    assert operation.start.deadline_s == seconds


def test_a_pin_without_a_name_gets_the_id_of_its_operation(book: Book) -> None:
    operation = book.open(Pin(location="ram", pin_id=""))
    assert operation.start
    assert isinstance(operation.start.request, Pin)
    assert operation.start.request.pin_id == operation.operation_id


def test_the_same_key_and_request_are_the_same_operation(book: Book) -> None:
    operation = book.open(idempotency_key="k")
    book.log.finish(operation, OperationStatus("done", 12))
    assert book.same("k") is operation
    assert book.same("l") is None
    assert book.same(None) is None


@pytest.mark.parametrize(
    "other",
    [
        ("a", msgspec.structs.replace(COMPRESS, tokens=None), None),
        ("a", msgspec.structs.replace(COMPRESS, cache_salt="s"), None),
        ("a", COMPRESS, 1.0),
        ("b", COMPRESS, None),
    ],
)
def test_the_same_key_for_another_request_is_a_conflict(
    book: Book, other: tuple[str, OperationRequest, float | None]
) -> None:
    operation = book.open(idempotency_key="k")
    with pytest.raises(ControlError, match=f"another operation: event {operation.operation_id}"):
        book.log.same("k", *other)


def test_the_key_of_a_refused_request_may_be_tried_again(book: Book) -> None:
    operation = book.open(idempotency_key="k")
    book.log.refuse(operation, UnknownName("method", "zip", ["cachegen"]))
    assert book.same("k") is None
    assert (operation.info().state, operation.info().message) == ("failed", "unknown method 'zip'")


def test_the_key_of_a_request_whose_process_ended_before_it_began_may_be_tried_again(
    book: Book,
) -> None:
    waiting, begun = book.open(idempotency_key="k"), book.open(idempotency_key="l")
    book.log.accept(begun, Scope(12, 3))
    for operation in (waiting, begun):
        book.log.fail(operation, NoWorker("gone"))
    assert book.same("k") is None
    assert book.same("l") is begun
    assert (waiting.refusal is None, begun.refusal is None) == (False, True)


def test_finished_events_are_kept_for_a_time_with_their_keys() -> None:
    book = Book(keep_s=60.0)
    operation = book.open(idempotency_key="k")
    running = book.open(deadline_s=1000.0)
    book.log.finish(operation, OperationStatus("done"))
    book.clock.now += 59
    book.log.expire()
    assert book.log.find(operation.operation_id) is operation
    book.clock.now += 1
    book.log.expire()
    assert book.log.all() == [running]
    assert book.same("k") is None


def test_no_more_finished_events_are_kept_than_agreed() -> None:
    book = Book(keep=3)
    operations = [book.open() for _ in range(5)]
    for operation in operations:
        book.log.finish(operation, OperationStatus("done"))
    book.log.expire()
    assert book.log.all() == [operations[4], operations[3], operations[2]]


def test_an_unknown_event_lists_the_latest_ones(book: Book) -> None:
    operations = [book.open() for _ in range(25)]
    with pytest.raises(UnknownName, match="unknown event 'x'") as info:
        book.log.find("x")
    assert info.value.known == [operation.operation_id for operation in reversed(operations[5:])]


def test_more_operations_than_allowed_at_once_are_refused() -> None:
    book = Book(max_active=2)
    first = book.open()
    book.open()
    with pytest.raises(ControlError, match="2 operations are under way"):
        book.open()
    book.log.finish(first, OperationStatus("done"))
    book.open()


def test_more_tokens_than_allowed_in_requests_that_wait_are_refused() -> None:
    book = Book(max_waiting_bytes=100)
    first = book.open()
    book.open()
    with pytest.raises(ControlError, match="under way"):
        book.open()
    book.log.accept(first, Scope(12, 3))
    book.open()


def test_asking_for_pins_is_no_event(book: Book) -> None:
    operation = book.open(ListPins(location="ram"))
    assert book.log.all() == []
    assert book.log.active(operation.operation_id) is operation
    book.log.finish(operation, OperationStatus("done"))
    assert operation.ended.is_set()
    assert book.counts["operations_total"] == book.counts["operations_done_total"] == 0


def test_begin_and_end_are_told_with_who_asked(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        operation = book.open(asked_by="10.0.0.7")
        book.log.accept(operation, Scope(12, 3))
        book.clock.now += 2
        book.log.finish(operation, OperationStatus("partial", 8, message="one was pinned"))
        book.log.expire()
    begun, ended = [record.getMessage() for record in caplog.records]
    assert operation.operation_id in begun
    assert "compress at 'a'/'ram', asked for by '10.0.0.7'" in begun
    assert operation.operation_id in ended
    assert "compress at 'a'/'ram' is partial after 2.0 s, 8 tokens: 'one was pinned'" in ended


def test_an_end_without_a_report_is_told_as_well(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        book.open(deadline_s=5.0)
        book.clock.now += 5
        book.log.expire()
    begun, ended = [record.getMessage() for record in caplog.records]
    assert "asked for by" not in begun
    assert "is expired after 5.0 s" in ended


def test_listing_pins_is_not_told(book: Book, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        operation = book.open(ListPins(location="ram"))
        book.log.finish(operation, OperationStatus("done"))
    assert caplog.records == []
