"""Whoever asks is told when the index holds what was noted before, and not earlier."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmcache_kit.agent.agent import Agent
from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.sync_barrier import AGAIN_S, Barrier
from lmcache_kit.controller.registry import Registry
from lmcache_kit.protocol import control as wire
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import (
    LOCATION,
    NAMESPACE,
    FakeClock,
    FakeEngine,
    Proxy,
    chunks_of,
    eventually,
)

PROMPT = list(range(100, 112))
SOON_S = 30.0


class Pair:
    """A session and a registry, with a connection that tests carry by hand."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.engine = FakeEngine()
        self.announcer = EventLog(self.engine.location)
        self.announcer.begin_with(self.engine.memory_tier.subscribe(self.announcer))
        self.stream = LocationFeed(self.engine, self.announcer)
        self.session = ControllerClient([self.stream], Identity("a", b"i" * 16), clock=self.clock)
        self.session.register_namespace(NAMESPACE)
        self.restart_controller()

    def restart_controller(self) -> None:
        self.registry = Registry(clock=self.clock, wall=self.clock)

    def turn(self) -> list[wire.FromAgent]:
        """What the session says."""
        said: list[wire.FromAgent] = []
        self.session.turn(lambda message: not said.append(message))  # type: ignore[func-returns-value]
        return said

    def exchange(self, lost: type[Any] | tuple[()] = ()) -> list[wire.FromAgent]:
        """One way and back; messages of a kind may be lost."""
        said = self.turn()
        for message in said:
            if not isinstance(message, lost):
                for _, answer in self.registry.handle("c", message):
                    self.session.handle(answer)
        return said

    def ask(self) -> Barrier:
        return self.stream.confirmations.ask()


@pytest.fixture
def pair() -> Pair:
    made = Pair()
    made.exchange()
    made.exchange()
    return made


def test_a_note_is_numbered_sent_and_asked_about_in_one_turn(pair: Pair) -> None:
    pair.engine.store(chunks_of([1, 2, 3, 4]))
    pair.turn()
    pair.engine.store(chunks_of([5, 6, 7, 8]))
    assert pair.session.gathering()
    wait = pair.ask()
    batch, confirm = pair.turn()
    assert isinstance(batch, wire.Batch)
    assert confirm == wire.Confirm(pair.engine.location, batch.seq)
    assert not wait.confirmed


def test_who_waits_is_released_by_the_answer(pair: Pair) -> None:
    pair.engine.store(chunks_of(PROMPT))
    wait = pair.ask()
    pair.exchange()
    assert wait.confirmed
    assert wait.until(0)
    assert len(pair.registry.index) == 3
    assert pair.turn() == []


def test_with_nothing_noted_the_answer_comes_all_the_same(pair: Pair) -> None:
    wait = pair.ask()
    pair.exchange()
    assert wait.confirmed


def test_an_answer_about_less_releases_nobody(pair: Pair) -> None:
    wait = pair.ask()
    pair.turn()
    pair.engine.store(chunks_of(PROMPT))
    later = pair.ask()
    pair.turn()
    pair.session.handle(wire.Confirmed(pair.engine.location, 0))
    assert (wait.confirmed, later.confirmed) == (True, False)
    pair.session.handle(wire.Confirmed("elsewhere", 99))
    assert not later.confirmed


def test_a_question_is_said_again_until_it_is_answered(pair: Pair) -> None:
    pair.ask()
    question = wire.Confirm(pair.engine.location, 0)
    assert pair.exchange(lost=wire.Confirm) == [question]
    assert pair.turn() == []
    assert pair.session.wait_s() == pytest.approx(AGAIN_S)
    pair.clock.now += AGAIN_S
    assert pair.exchange() == [question]
    pair.clock.now += AGAIN_S
    assert pair.turn() == []


def test_nobody_is_asked_for_who_no_longer_waits(pair: Pair) -> None:
    assert not pair.ask().until(0)
    assert pair.turn() == []


def test_a_batch_that_was_lost_is_fetched_before_the_answer(pair: Pair) -> None:
    pair.engine.store(chunks_of(PROMPT))
    wait = pair.ask()
    pair.exchange(lost=wire.Batch)
    assert not wait.confirmed
    pair.exchange()
    pair.clock.now += AGAIN_S
    pair.exchange()
    assert wait.confirmed
    assert len(pair.registry.index) == 3


def test_a_controller_that_begins_anew_is_asked_as_well(pair: Pair) -> None:
    pair.engine.store(chunks_of(PROMPT))
    wait = pair.ask()
    pair.turn()
    pair.restart_controller()
    for _ in range(6):
        pair.exchange()
        pair.clock.now += 0.5
    assert wait.confirmed
    assert len(pair.registry.index) == 3


def test_notes_that_were_dropped_are_confirmed_with_the_snapshot_that_holds_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.announcer, "_max_notes", 1)
    pair.engine.store(chunks_of(PROMPT))
    wait = pair.ask()
    pair.exchange(lost=wire.SnapshotPart)
    assert not wait.confirmed
    for _ in range(8):
        pair.clock.now += 0.5
        pair.exchange()
    assert wait.confirmed
    assert len(pair.registry.index) == 3


def test_before_it_is_registered_a_session_asks_nothing() -> None:
    pair = Pair()
    pair.engine.store(chunks_of(PROMPT))
    wait = pair.ask()
    (said,) = pair.exchange()
    assert isinstance(said, wire.Register)
    pair.exchange()
    assert wait.confirmed


# With threads and sockets.


def confirmed(agent: Agent, timeout_s: float = SOON_S) -> bool:
    return agent.confirm(LOCATION, timeout_s)


def test_what_was_noted_is_found_once_it_is_confirmed(
    controller: Running, start_agent: StartAgent
) -> None:
    agent, engine = start_agent(controller.url, heartbeat_s=60.0)
    for number in range(30):
        tokens = [number, *PROMPT]
        engine.store(chunks_of(tokens))
        assert confirmed(agent)
        assert controller.held(tokens) == {"a": 13}
        engine.evict([chunk.key for chunk in chunks_of(tokens)])
        assert confirmed(agent)
        assert controller.held(tokens) == {}


def test_many_may_wait_at_once(controller: Running, start_agent: StartAgent) -> None:
    agent, engine = start_agent(controller.url)

    def move_in(number: int) -> bool:
        tokens = [number, *PROMPT]
        engine.store(chunks_of(tokens))
        return confirmed(agent) and controller.held(tokens) == {"a": 13}

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(move_in, range(64)))


def test_a_cut_connection_and_another_controller_do_not_stop_it(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    first, second = start_controller(), start_controller()
    with Proxy(first.port) as proxy:
        agent, engine = start_agent(proxy.url)
        assert confirmed(agent)
        proxy.cut()
        engine.store(chunks_of(PROMPT))
        assert confirmed(agent)
        assert first.held(PROMPT) == {"a": 12}
        proxy.port = second.port
        proxy.cut()
        eventually(lambda: second.counters()["instances_alive"] == 1)
        assert confirmed(agent)
        assert second.held(PROMPT) == {"a": 12}


def test_without_a_controller_it_is_not_confirmed(start_agent: StartAgent) -> None:
    agent, _ = start_agent("localhost:1")
    assert not confirmed(agent, 0.2)


@pytest.fixture
def asking(start_agent: StartAgent) -> Iterator[tuple[Agent, list[bool]]]:
    """An agent without a controller, and the answer that a thread waits for."""
    agent, _ = start_agent("localhost:1")
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(confirmed(agent)))
    thread.start()
    yield agent, answers
    thread.join(SOON_S)


def test_an_agent_that_stops_lets_go_of_who_waits(asking: tuple[Agent, list[bool]]) -> None:
    agent, answers = asking
    began = time.monotonic()
    agent.stop()
    eventually(lambda: answers == [False])
    assert not confirmed(agent)
    assert time.monotonic() - began < SOON_S
