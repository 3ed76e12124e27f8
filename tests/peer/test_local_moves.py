"""Moves between the locations of one cache, without peers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from lmcache_kit_cpu_backend.backend import LocalCPUBackend

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import Move, OperationStatus, Peer, Progress, Scope
from lmcache_kit.peer import move_executor
from lmcache_kit.peer.move_executor import MoveContext, MoveExecutor, RunningMove
from tests.cache.stores import Cache, Dict
from tests.support.waiting import eventually

MEMORY = "memory"
WAIT_S = 30.0


def make_engine(memory: int) -> CacheEngine:
    return CacheEngine(LocalCPUBackend(memory), LRU(), location=MEMORY)


class Place:
    """A cache with tiers A and B, which takes no part in moves with peers."""

    def __init__(self) -> None:
        self.stores = [Dict(), Dict()]
        self.cache = Cache(make_engine, *self.stores, memory=1 << 20, clock=time.monotonic)
        self.engine = self.cache.engine
        self.moves = MoveExecutor(
            MoveContext(self.engine, NamespaceRegistry(), lambda location, timeout_s: True)
        )
        self.outcomes: list[OperationStatus] = []
        self.reports: list[Progress] = []
        self.over = threading.Event()
        self.scope: Scope | None = None

    def start(self, at: str, to: str, *, deadline_s: float = WAIT_S) -> RunningMove:
        request = Move(location=to, source="i", source_location=at)
        return self.moves.start(request, deadline_s=deadline_s, listener=self)

    def accepted(self, scope: Scope) -> None:
        self.scope = scope

    def progressed(self, progress: Progress) -> None:
        self.reports.append(progress)

    def ended(self, status: OperationStatus) -> None:
        self.outcomes.append(status)
        self.over.set()

    def outcome(self) -> OperationStatus:
        assert self.over.wait(WAIT_S), "the move did not end"
        return self.outcomes[0]

    def count(self, location: str) -> int:
        return len(self.engine.locations[location].chunk_refs(None, None))

    def close(self) -> None:
        for each in self.stores:
            each.gate.set()
        self.moves.close()
        self.cache.close()
        self.engine.close()


@pytest.fixture
def place() -> Iterator[Place]:
    """Three chunks in both tiers, and empty memory."""
    place = Place()
    place.cache.store(range(12))
    place.engine.memory_tier.clear()
    yield place
    place.close()


def test_a_local_move_needs_no_peers(place: Place) -> None:
    place.engine.locations["B"].clear()
    place.start("A", "B")
    outcome = place.outcome()
    assert place.scope == Scope(outcome.tokens, 3)
    assert (outcome.state, outcome.message) == ("done", "")
    assert (place.count("A"), place.count("B")) == (0, 3)
    assert place.reports[0].chunks_done == 0
    assert place.reports[-1].chunks_done == 3


def test_a_move_from_a_peer_is_refused_without_access_to_peers(place: Place) -> None:
    request = Move(
        location=MEMORY, source="j", source_location="A", peer=Peer("e", "h:1", b"", b"")
    )
    with pytest.raises(ControlError, match="takes no part in moves"):
        place.moves.start(request, deadline_s=1, listener=place)


@pytest.mark.parametrize(
    ("at", "to", "error"),
    [("A", "A", InvalidQuery), ("Z", "A", UnknownName), ("A", "Z", UnknownName)],
)
def test_locations_are_checked_before_the_move_starts(
    place: Place, at: str, to: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        place.start(at, to)
    assert place.outcomes == []


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_move_whose_store_hangs_ends_and_does_nothing_more(
    place: Place, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(move_executor, "GRACE_S", 0.05)
    place.stores[0].gate.clear()
    move = place.start("A", MEMORY, deadline_s=WAIT_S if end == "cancelled" else 0.05)
    if end == "cancelled":
        eventually(lambda: "get" in place.stores[0].calls)
        move.cancel()
    assert place.outcome().state == end
    place.stores[0].gate.set()
    place.moves.close()
    assert place.count("A") == 3
    assert len(place.outcomes) == 1
