"""Moves over a network that damages, cuts and stalls: nothing wrong is kept, nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.testing.hosts import cut, flip
from tests.support.proxies import Proxy, unchanged

if TYPE_CHECKING:
    from .conftest import Eventually, MakePlace, Place

TOKENS = range(16 * 24 + 5)


def proxy_of(place: Place) -> Proxy:
    return Proxy(int(place.peer.url.rpartition(":")[2]))


@pytest.fixture
def network(source: Place) -> Iterator[Proxy]:
    with proxy_of(source) as network:
        yield network


@pytest.fixture
def length(make_place: MakePlace) -> int:
    """How many bytes a move of TOKENS takes."""
    source, goal = make_place("source"), make_place("goal")
    with proxy_of(source) as network:
        source.store(TOKENS)
        assert goal.move(source, TOKENS, url=network.address).state == "done"
    return network.passed


@pytest.mark.parametrize("place", range(20))
def test_a_damaged_byte_is_noticed_wherever_it_is(
    source: Place, goal: Place, network: Proxy, length: int, place: int
) -> None:
    source.store(TOKENS)
    network.change = flip(random.Random(place).randrange(length))
    outcome = goal.start(goal.request(source, TOKENS, url=network.address), deadline_s=5).outcome
    network.change = unchanged
    assert outcome.state in ("done", "partial", "failed", "expired")
    assert max(goal.hit(TOKENS), source.hit(TOKENS)) == len(TOKENS)
    if outcome.state == "done":
        assert goal.hit(TOKENS) == len(TOKENS)


def test_a_chunk_that_the_network_damaged_is_read_again(
    source: Place, goal: Place, network: Proxy, length: int
) -> None:
    source.store(TOKENS)
    network.change = flip(length // 2)
    outcome = goal.move(source, TOKENS, url=network.address)
    assert (outcome.state, outcome.tokens) == ("done", len(TOKENS))
    assert goal.hit(TOKENS) == len(TOKENS)
    assert source.stats()["corrupt_total"] == 0


@pytest.mark.parametrize("tenth", range(1, 10))
def test_a_cut_in_the_middle_loses_nothing(
    source: Place, goal: Place, network: Proxy, length: int, tenth: int
) -> None:
    source.store(TOKENS)
    network.change = cut(length * tenth // 10)
    outcome = goal.move(source, TOKENS, url=network.address)
    assert outcome.state in ("partial", "failed")
    assert outcome.message
    assert source.hit(TOKENS) == len(TOKENS)
    network.change = unchanged
    again = goal.move(source, TOKENS, url=network.address)
    assert (again.state, again.tokens) == ("done", len(TOKENS))
    assert goal.hit(TOKENS) == len(TOKENS)


def test_a_network_that_stalls_ends_the_move_by_its_deadline_and_nothing_lands_later(
    source: Place, goal: Place, network: Proxy, length: int, eventually: Eventually
) -> None:
    source.store(TOKENS)

    def stall(before: int, data: bytes) -> bytes:
        if before > length // 2:
            network.flowing.clear()
            network.flowing.wait()
        return data

    network.change = stall
    outcome = goal.start(goal.request(source, TOKENS, url=network.address), deadline_s=1.0).outcome
    assert outcome.state == "expired"
    eventually(lambda: goal.idle)
    goal.store(range(9000, 9000 + 16 * 60))
    network.change = unchanged
    network.flowing.set()
    network.cut()
    assert goal.hit(range(9000, 9000 + 16 * 60)) == 16 * 60
    assert source.hit(TOKENS) == len(TOKENS)


def test_links_that_were_cut_while_nobody_used_them_are_made_anew(
    source: Place, goal: Place, network: Proxy
) -> None:
    source.store(TOKENS)
    source.store(range(5000, 5016))
    assert goal.move(source, TOKENS, url=network.address).state == "done"
    network.cut()
    assert goal.move(source, range(5000, 5016), url=network.address).state == "done"
