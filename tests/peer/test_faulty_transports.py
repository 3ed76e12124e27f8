"""What moves do when a transport is late, breaks, or is no good: nothing is lost or wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Dial, Link, ReadableRegion, ReadResult, Region, Transport
from lmcache_kit.plugins import Plugins
from lmcache_kit.plugins.records import Offer, PluginInfo
from lmcache_kit.specs import Kind, TransportSpec

if TYPE_CHECKING:
    from .conftest import Eventually, MakePlace, Place


class Bench:
    """Transports that read each other's memory here and now, and the faults they have.

    ``late``: reads reach their deadline after so many regions, and write once ``late_write`` is
    set. ``breaks``: so many links break at their next read. ``closed``: idle links were closed.
    """

    def __init__(self) -> None:
        self.memories: dict[bytes, memoryview] = {}
        self.late: int | None = None
        self.late_write = threading.Event()
        self.settled = threading.Event()
        self.breaks = 0
        self.odd: BaseException | None = None
        self.refuses = ""
        self.links: list[BenchLink] = []


class BenchLink(Link):
    def __init__(self, bench: Bench, memory: memoryview) -> None:
        self.bench = bench
        self.memory = memory
        self.closed = False

    @property
    def description(self) -> str:
        return "thin air"

    def read(self, offer: bytes, into: Sequence[Region], timeout_s: float) -> Iterator[ReadResult]:
        bench = self.bench
        if self.closed:
            raise TransportError("the link is closed")
        if bench.odd:
            raise bench.odd
        if bench.breaks:
            bench.breaks -= 1
            raise TransportError("the link broke")
        name, _, listed = offer.partition(b"|")
        there = bench.memories[name]
        offsets = [int(each) for each in listed.split()]
        for number, (offset, region) in enumerate(zip(offsets, into, strict=True)):
            if bench.late is not None and number >= bench.late:
                rest = list(zip(offsets, into, strict=True))[number:]
                threading.Thread(target=self._land, args=(there, rest)).start()
                raise TransferTimeout("too late", settled=bench.settled.is_set)
            self._copy(there, offset, region)
            yield ReadResult(number)

    def _land(self, there: memoryview, rest: list[tuple[int, Region]]) -> None:
        self.bench.late_write.wait()
        for offset, region in rest:
            self._copy(there, offset, region)
        self.bench.settled.set()

    def _copy(self, there: memoryview, offset: int, region: Region) -> None:
        source = there[offset : offset + region.nbytes]
        self.memory[region.offset : region.offset + region.nbytes] = source

    def close(self) -> None:
        self.closed = True


class BenchTransport(Transport):
    bench: Bench

    def __init__(self, memory: memoryview, host: str) -> None:
        self.memory = memory
        self.name = str(id(self)).encode()
        self.bench.memories[self.name] = memory

    def address(self) -> bytes:
        return self.name

    def offer(self, regions: Sequence[ReadableRegion]) -> bytes:
        return self.name + b"|" + b" ".join(b"%d" % each.region.offset for each in regions)

    def withdraw(self, offer: bytes) -> None:
        pass

    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        if self.bench.refuses:
            raise TransportError(self.bench.refuses)
        link = BenchLink(self.bench, self.memory)
        self.bench.links.append(link)
        return link

    def serve(self, connection: socket.socket) -> None:
        connection.close()

    def close(self) -> None:
        pass


class BenchPlugins(Plugins):
    """The installed ones, and one more transport."""

    transport: type[Transport]

    def specs(self, kind: Kind) -> list[Offer]:
        found = super().specs(kind)
        if kind == "transport":
            spec = TransportSpec("bench", "a:b", "", capabilities=frozenset({"one-sided"}))
            found.append(Offer(kind, spec, PluginInfo("bench", "bench", "1")))
        return found

    def spec(self, kind: Kind, name: str) -> Any:
        if name != "bench":
            return super().spec(kind, name)
        return TransportSpec("bench", "a:b", "")

    def resolve(self, kind: Kind, name: str) -> Any:
        return self.transport if name == "bench" else super().resolve(kind, name)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def source(make_bench: MakePlace) -> Place:
    return make_bench("source")


@pytest.fixture
def goal(make_bench: MakePlace) -> Place:
    return make_bench("goal")


@pytest.fixture
def make_bench(make_place: MakePlace, bench: Bench) -> MakePlace:
    def make(name: str, **how: object) -> Place:
        plugins = BenchPlugins.load()
        assert isinstance(plugins, BenchPlugins)
        plugins.transport = type("Mine", (BenchTransport,), {"bench": bench})
        return make_place(name, plugins=plugins, transfer_channel="bench", **how)

    return make


def test_a_third_party_transport_moves_kv(source: Place, goal: Place) -> None:
    source.store(range(40))
    outcome = goal.move(source, range(40))
    assert (outcome.state, outcome.tokens) == ("done", 40)
    assert outcome.progress.transfer is not None
    assert outcome.progress.transfer.description == "thin air"
    assert goal.hit(range(40)) == 40


def test_memory_that_bytes_may_still_come_to_is_used_for_nothing_else(
    make_bench: MakePlace, bench: Bench, source: Place, eventually: Eventually
) -> None:
    goal = make_bench("goal", mib=24 * 16384 / (1 << 20))
    source.store(range(48))
    bench.late = 1
    outcome = goal.move(source, range(48))
    assert (outcome.state, outcome.tokens) == ("partial", 16)
    assert "too late" in outcome.message
    assert goal.stats()["quarantined_bytes"] == 2 * 16384
    assert (goal.hit(range(48)), source.hit(range(48))) == (16, 48)
    everything = range(5000, 5000 + 24 * 16)
    goal.store(everything)
    assert goal.hit(everything) == 22 * 16
    bench.late_write.set()
    eventually(lambda: goal.stats()["quarantined_bytes"] == 0)
    assert goal.hit(everything) == 22 * 16
    goal.store(everything)
    assert goal.hit(everything) == 24 * 16


def test_a_transport_with_too_much_unsettled_is_not_used_until_it_settles(
    make_bench: MakePlace, bench: Bench, source: Place, eventually: Eventually
) -> None:
    goal = make_bench("goal", mib=8 * 16384 / (1 << 20))
    for start in (0, 100, 200):
        source.store(range(start, start + 16))
    bench.late = 0
    assert goal.move(source, range(16)).state == "failed"
    bench.late = None
    transfer = goal.move(source, range(100, 116)).progress.transfer
    assert transfer is not None
    assert transfer.transport == "tcp"
    assert "not bench: 16384 bytes of transfers" in transfer.description
    bench.late_write.set()
    eventually(lambda: goal.stats()["quarantined_bytes"] == 0)
    transfer = goal.move(source, range(200, 216)).progress.transfer
    assert transfer is not None


def test_a_link_that_the_peer_closed_while_nobody_used_it_is_made_anew(
    source: Place, goal: Place, bench: Bench
) -> None:
    source.store(range(16))
    source.store(range(100, 116))
    assert goal.move(source, range(16)).state == "done"
    bench.breaks = 1
    outcome = goal.move(source, range(100, 116))
    assert (outcome.state, outcome.tokens) == ("done", 16)
    assert len(bench.links) == 2


def test_a_link_that_breaks_at_once_ends_the_move(source: Place, goal: Place, bench: Bench) -> None:
    source.store(range(16))
    bench.breaks = 1
    outcome = goal.move(source, range(16))
    assert (outcome.state, outcome.message) == ("failed", "the link broke")
    assert bench.links[0].closed
    assert source.hit(range(16)) == 16
    assert goal.move(source, range(16)).state == "done"


def test_whatever_a_transport_raises_ends_the_move_and_nothing_else(
    source: Place, goal: Place, bench: Bench
) -> None:
    source.store(range(16))
    bench.odd = ZeroDivisionError("of a third-party plugin")
    outcome = goal.move(source, range(16))
    assert outcome.state == "failed"
    assert "ZeroDivisionError" in outcome.message
    bench.odd = None
    assert goal.move(source, range(16)).state == "done"


def test_when_no_transport_serves_every_reason_is_said(
    make_place: MakePlace, make_bench: MakePlace, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, goal = make_bench("source"), make_bench("goal")
    source.store(range(16))
    bench.refuses = "the air is too thick"

    def broken(*_: object) -> None:
        raise TransportError("no TCP today")

    monkeypatch.setattr("lmcache_kit_tcp_transport.transport.TcpTransport.connect", broken)
    outcome = goal.move(source, range(16))
    assert outcome.state == "failed"
    assert outcome.message == (
        "no transport reaches instance 'source': bench: the air is too thick; tcp: no TCP today"
    )


def test_a_move_that_is_cancelled_ends_soon_and_keeps_what_came(
    source: Place, goal: Place, bench: Bench
) -> None:
    source.store(range(16))
    running = goal.start(goal.request(source, range(16)))
    running.move.cancel()
    assert running.outcome.state in ("cancelled", "done")
    assert max(source.hit(range(16)), goal.hit(range(16))) == 16


def test_a_move_that_is_cancelled_before_the_end_leaves_the_source_as_it_is(
    source: Place, goal: Place
) -> None:
    source.store(range(16))
    asked, cancelled = threading.Event(), threading.Event()
    goal.before_confirm = lambda: (asked.set(), cancelled.wait(20))
    running = goal.start(goal.request(source, range(16)))
    assert asked.wait(20)
    running.move.cancel()
    cancelled.set()
    assert running.outcome.state == "cancelled"
    assert (source.hit(range(16)), goal.hit(range(16))) == (16, 16)


def test_a_move_whose_time_is_over_is_expired_and_says_so(source: Place, goal: Place) -> None:
    source.store(range(16))
    goal.before_confirm = lambda: threading.Event().wait(0.4)
    running = goal.start(goal.request(source, range(16)), deadline_s=0.3)
    assert running.outcome.state == "expired"
    assert "its time was over" in running.outcome.message
    assert source.hit(range(16)) == 16


def test_closing_a_cache_ends_its_moves(source: Place, goal: Place) -> None:
    source.store(range(16))
    inside = threading.Event()
    goal.before_confirm = inside.set
    goal.confirms = False
    running = goal.start(goal.request(source, range(16)))
    assert inside.wait(20)
    goal.close()
    assert running.outcome.state in ("cancelled", "partial")
