"""A barrier is released when the index holds every change before it, and not earlier."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache_kit.agent.agent import Agent
from lmcache_kit.agent.sync_barrier import ASK_AGAIN_S
from lmcache_kit.protocol import control as wire
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import LOCATION, chunks_of
from tests.control.pair import Pair
from tests.support.proxies import Proxy
from tests.support.waiting import eventually

PROMPT = list(range(100, 112))
SOON_S = 30.0


@pytest.fixture
def pair() -> Pair:
    made = Pair()
    made.exchange()
    made.exchange()
    return made


def test_a_change_is_numbered_sent_and_asked_about_in_one_turn(pair: Pair) -> None:
    pair.tier.store(chunks_of([1, 2, 3, 4]))
    pair.turn()
    pair.tier.store(chunks_of([5, 6, 7, 8]))
    assert pair.client.gathering()
    barrier = pair.open()
    batch, confirm = pair.turn()
    assert isinstance(batch, wire.Batch)
    assert confirm == wire.Confirm(pair.tier.location, batch.seq)
    assert not barrier.confirmed


def test_a_barrier_is_released_by_the_answer(pair: Pair) -> None:
    pair.tier.store(chunks_of(PROMPT))
    barrier = pair.open()
    pair.exchange()
    assert barrier.confirmed
    assert barrier.wait(0)
    assert len(pair.registry.index) == 3
    assert pair.turn() == []


def test_without_changes_the_answer_comes_all_the_same(pair: Pair) -> None:
    barrier = pair.open()
    pair.exchange()
    assert barrier.confirmed


def test_an_answer_about_less_releases_no_barrier(pair: Pair) -> None:
    barrier = pair.open()
    pair.turn()
    pair.tier.store(chunks_of(PROMPT))
    later = pair.open()
    pair.turn()
    pair.client.handle(wire.Confirmed(pair.tier.location, 0))
    assert (barrier.confirmed, later.confirmed) == (True, False)
    pair.client.handle(wire.Confirmed("elsewhere", 99))
    assert not later.confirmed


def test_a_question_is_repeated_until_it_is_answered(pair: Pair) -> None:
    pair.open()
    question = wire.Confirm(pair.tier.location, 0)
    assert pair.exchange(lost=wire.Confirm) == [question]
    assert pair.turn() == []
    assert pair.client.wait_s() == pytest.approx(ASK_AGAIN_S)
    pair.clock.now += ASK_AGAIN_S
    assert pair.exchange() == [question]
    pair.clock.now += ASK_AGAIN_S
    assert pair.turn() == []


def test_nothing_is_asked_for_a_barrier_that_no_longer_waits(pair: Pair) -> None:
    assert not pair.open().wait(0)
    assert pair.turn() == []


def test_a_batch_that_was_lost_is_fetched_before_the_answer(pair: Pair) -> None:
    pair.tier.store(chunks_of(PROMPT))
    barrier = pair.open()
    pair.exchange(lost=wire.Batch)
    assert not barrier.confirmed
    pair.exchange()
    pair.clock.now += ASK_AGAIN_S
    pair.exchange()
    assert barrier.confirmed
    assert len(pair.registry.index) == 3


def test_a_controller_that_begins_anew_is_asked_as_well(pair: Pair) -> None:
    pair.tier.store(chunks_of(PROMPT))
    barrier = pair.open()
    pair.turn()
    pair.restart_controller()
    for _ in range(6):
        pair.exchange()
        pair.clock.now += 0.5
    assert barrier.confirmed
    assert len(pair.registry.index) == 3


def test_changes_that_were_dropped_are_confirmed_with_the_snapshot_that_holds_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(max_pending=1)
    pair.exchange()
    pair.exchange()
    pair.tier.store(chunks_of(PROMPT))
    barrier = pair.open()
    pair.exchange(lost=wire.SnapshotPart)
    assert not barrier.confirmed
    for _ in range(8):
        pair.clock.now += 0.5
        pair.exchange()
    assert barrier.confirmed
    assert len(pair.registry.index) == 3


def test_before_it_is_registered_a_client_asks_nothing() -> None:
    pair = Pair()
    pair.tier.store(chunks_of(PROMPT))
    barrier = pair.open()
    (said,) = pair.exchange()
    assert isinstance(said, wire.Register)
    pair.exchange()
    assert barrier.confirmed


# With threads and sockets.


def confirmed(agent: Agent, timeout_s: float = SOON_S) -> bool:
    return agent.confirm(LOCATION, timeout_s)


def test_a_change_is_found_once_it_is_confirmed(
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
        agent, engine = start_agent(proxy.address)
        assert confirmed(agent)
        proxy.cut()
        engine.store(chunks_of(PROMPT))
        assert confirmed(agent)
        assert first.held(PROMPT) == {"a": 12}
        proxy.lead_to(second.port)
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


def test_an_agent_that_stops_releases_its_barriers(asking: tuple[Agent, list[bool]]) -> None:
    agent, answers = asking
    agent.stop()
    eventually(lambda: answers == [False])
    assert not confirmed(agent)
