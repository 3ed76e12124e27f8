"""Moves from and to tiers below memory, between two caches and within one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache_kit.errors import BackendError, InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import Clear, Move, OperationStatus, Pin
from lmcache_kit.keys import pack_tokens
from lmcache_kit.service.operations import EngineExecutor
from tests.cache.stores import Dict
from tests.control.fakes import RecordingListener
from tests.peer.conftest import DEADLINE_S, LAYOUT, PLACE, MakePlace, Place

CHUNK_BYTES = LAYOUT.payload_bytes(16)


@pytest.fixture
def low(make_place: MakePlace) -> Place:
    """A source with two tiers, whose memory is empty."""
    place = make_place("low", stores=[Dict(), Dict()])
    place.store(range(40))
    place.settle()
    place.engine.memory_tier.clear()
    return place


def test_a_move_takes_from_a_tier(low: Place, goal: Place) -> None:
    outcome = goal.move(low, range(40), at="A")
    assert (outcome.state, outcome.tokens, outcome.message) == ("done", 40, "")
    low.settle()
    assert low.at("A") == set()
    assert len(low.at("B")) == 3
    assert low.tiers[0].stats()["moved_out_chunks_total"] == 3
    assert goal.hit(range(40)) == 40


def test_a_copy_leaves_the_tier_as_it_is(low: Place, goal: Place) -> None:
    assert goal.move(low, None, at="B", copy=True).state == "done"
    assert len(low.at("B")) == 3


def test_a_move_goes_to_a_tier_and_is_served_from_there(
    source: Place, make_place: MakePlace
) -> None:
    goal = make_place("goal", stores=[Dict()])
    source.store(range(40))
    outcome = goal.move(source, range(40), to="A")
    assert (outcome.state, outcome.tokens) == ("done", 40)
    assert source.everything() == set()
    assert len(goal.at("A")) == 3
    goal.engine.memory_tier.clear()
    assert goal.hit(range(40)) == 40


def test_more_than_fits_into_memory_goes_to_a_tier(source: Place, make_place: MakePlace) -> None:
    goal = make_place("goal", mib=0.125, stores=[Dict()])
    source.store(range(640))
    outcome = goal.move(source, range(640), to="A")
    assert (outcome.state, outcome.tokens) == ("done", 640)
    assert 40 * CHUNK_BYTES > 1 << 17
    assert len(goal.at("A")) == 40
    assert source.everything() == set()


def test_more_than_fits_into_the_memory_of_the_source_comes_from_a_tier(
    make_place: MakePlace, goal: Place
) -> None:
    source = make_place("small", mib=3 * CHUNK_BYTES / (1 << 20), stores=[Dict()])
    for start in range(0, 160, 16):
        source.store(range(start, start + 16))
        source.settle()
    source.engine.memory_tier.clear()
    outcome = goal.move(source, at="A")
    assert (outcome.state, outcome.tokens, outcome.message) == ("done", 160, "")
    assert source.at("A") == set()
    assert len(goal.everything()) == 10


def test_moves_at_once_wait_for_room_in_the_memory_of_the_source(
    make_place: MakePlace, goal: Place
) -> None:
    source = make_place("small", mib=3 * CHUNK_BYTES / (1 << 20), stores=[Dict()])
    prompts = [range(start, start + 48) for start in range(0, 6000, 1000)]
    for prompt in prompts:
        for end in (16, 32, 48):
            source.store(prompt[:end])
            source.settle()
    source.engine.memory_tier.clear()
    with ThreadPoolExecutor(len(prompts)) as pool:
        outcomes = list(pool.map(lambda prompt: goal.move(source, prompt, at="A"), prompts))
    assert {(each.state, each.tokens, each.message) for each in outcomes} == {("done", 48, "")}


def test_a_source_whose_memory_stays_full_says_so(make_place: MakePlace, goal: Place) -> None:
    mib = 3 * CHUNK_BYTES / (1 << 20)
    source = make_place("small", mib=mib, stores=[Dict()], room_s=0.2)
    source.store(range(48))
    source.settle()
    source.engine.memory_tier.clear()
    source.store(range(100, 148))
    source.settle()
    lease, descriptors = source.engine.transfers.lease(list(source.everything()), "a reader")
    assert len(descriptors) == 3
    outcome = goal.move(source, range(48), at="A")
    assert (outcome.state, outcome.tokens) == ("failed", 0)
    assert "memory has no room for what is to be read from A" in outcome.message
    assert len(source.at("A")) == 6
    source.engine.release(lease, None)


def test_what_a_full_tier_does_not_take_stays_at_the_source(
    source: Place, make_place: MakePlace
) -> None:
    goal = make_place("goal", stores=[Dict(capacity=2 * CHUNK_BYTES)])
    source.store(range(64))
    outcome = goal.move(source, range(64), to="A")
    assert outcome.state == "partial"
    assert "A did not take it" in outcome.message
    assert "the source keeps chunks: 2 that others there follow" in outcome.message
    assert len(goal.at("A")) == 2
    assert source.hit(range(64)) == 64


def test_what_a_move_brings_to_a_full_tier_does_not_push_itself_out(
    source: Place, make_place: MakePlace
) -> None:
    goal = make_place("goal", stores=[Dict(capacity=2 * CHUNK_BYTES)])
    for start in range(0, 400, 100):
        source.store(range(start, start + 16))
    outcome = goal.move(source, to="A")
    assert (outcome.state, outcome.tokens) == ("partial", 32)
    assert len(goal.at("A")) == len(source.everything()) == 2
    assert goal.at("A").isdisjoint(source.everything())


def test_a_tier_that_fails_ends_the_move_and_the_source_keeps_all(
    source: Place, make_place: MakePlace
) -> None:
    goal = make_place("goal", stores=[Dict()])
    goal.stores[0].broken = BackendError("read-only file system")  # type: ignore[attr-defined]
    source.store(range(40))
    outcome = goal.move(source, range(40), to="A")
    assert outcome.state == "failed"
    assert "read-only file system" in outcome.message
    assert source.hit(range(40)) == 40


def test_what_a_tier_has_already_is_not_sent(source: Place, make_place: MakePlace) -> None:
    goal = make_place("goal", stores=[Dict()])
    source.store(range(40))
    goal.store(range(32))
    goal.settle()
    goal.engine.memory_tier.clear()
    outcome = goal.move(source, range(40), to="A")
    assert outcome.state == "done"
    assert "2 of 3 chunks were here already" in outcome.message
    assert outcome.progress.transfer is not None
    assert outcome.progress.transfer.nbytes == LAYOUT.payload_bytes(8)


def test_damage_in_a_tier_does_not_travel(low: Place, goal: Place) -> None:
    store = low.stores[0]
    assert isinstance(store, Dict)
    key = list(store.blobs)[1]
    meta, data = store.blobs[key]
    store.blobs[key] = (meta, b"?" + data[1:])
    outcome = goal.move(low, range(40), at="A")
    assert goal.hit(range(40)) == 16
    assert outcome.tokens < 40
    assert low.tiers[0].stats()["corrupt_total"] == 1


# Within one cache.


class Within:
    """The executor of one place's operations."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.executor = EngineExecutor(
            place.engine,
            place.codecs,
            namespaces=place.namespaces,
            moves=place.moves,
        )

    def do(self, order: Move | Clear | Pin) -> OperationStatus:
        listener = RecordingListener()
        self.executor.start(order, deadline_s=DEADLINE_S, listener=listener)
        status = listener.wait(DEADLINE_S)
        self.place.settle()
        return status

    def move(self, at: str, to: str, *, copy: bool = False) -> OperationStatus:
        return self.do(
            Move(
                location=to,
                tokens=pack_tokens(range(40)),
                source=self.place.name,
                source_location=at,
                copy=copy,
            )
        )


@pytest.fixture
def within(low: Place) -> Within:
    return Within(low)


@pytest.mark.parametrize(("at", "to"), [("A", PLACE), ("A", "B"), (PLACE, "A"), ("B", "A")])
def test_a_move_from_one_location_to_another(within: Within, at: str, to: str) -> None:
    place = within.place
    if at == PLACE:
        place.store(range(40))
        place.settle()
    for other in {PLACE, "A", "B"} - {at}:
        place.engine.locations[other].clear()
    outcome = within.move(at, to)
    assert (outcome.state, outcome.tokens, outcome.message) == ("done", 40, "")
    assert place.at(at) == set()
    assert len(place.at(to)) == 3
    assert outcome.progress.transfer is not None
    assert outcome.progress.transfer.transport == "local"
    assert outcome.progress.transfer.nbytes == LAYOUT.payload_bytes(40)
    assert place.hit(range(40)) == 40


def test_a_copy_keeps_both(within: Within) -> None:
    assert within.move("A", PLACE, copy=True).state == "done"
    assert len(within.place.at("A")) == len(within.place.at(PLACE)) == 3


def test_nothing_is_deleted_that_the_controller_does_not_know_elsewhere(within: Within) -> None:
    within.place.confirms = False
    outcome = within.move("A", PLACE)
    assert "did not confirm it in time, so the source keeps all" in outcome.message
    assert len(within.place.at("A")) == 3


def test_what_could_not_be_found_at_the_goal_stays_at_the_source(within: Within) -> None:
    """Chunks come one by one, and those behind one that does not come are of no use there."""
    place = within.place
    place.engine.locations["B"].clear()
    store = place.stores[1]
    assert isinstance(store, Dict)
    store.refused = next(iter(place.engine.locations["A"].chunk_refs(None, None))).key
    outcome = within.move("A", "B")
    assert outcome.state == "partial"
    assert len(place.at("A")) == 3
    place.engine.memory_tier.clear()
    assert place.hit(range(40)) == 40


def test_what_is_pinned_at_the_source_stays_there(within: Within) -> None:
    within.do(Pin(location="A", tokens=pack_tokens(range(40)), pin_id="p"))
    outcome = within.move("A", PLACE)
    assert "the source keeps chunks: 3 that are pinned" in outcome.message
    assert len(within.place.at("A")) == 3


def test_what_does_not_fit_into_memory_stays_in_the_tier(make_place: MakePlace) -> None:
    place = make_place("small", mib=2 * CHUNK_BYTES / (1 << 20), stores=[Dict()])
    for start in (0, 16, 32):
        place.store(range(start, start + 16))
        place.settle()
    within = Within(place)
    place.engine.memory_tier.pin(None, pack_tokens(range(32, 48)), "p")
    order = Move(location=PLACE, source="small", source_location="A")
    outcome = within.do(order)
    assert outcome.state == "partial"
    assert "there is no room here for" in outcome.message
    assert place.hit(range(32, 48)) == 16
    assert len(place.at("A")) >= 1


def test_more_than_fits_into_memory_goes_from_tier_to_tier(make_place: MakePlace) -> None:
    place = make_place("small", mib=3 * CHUNK_BYTES / (1 << 20), stores=[Dict(), Dict()])
    for start in range(0, 160, 16):
        place.store(range(start, start + 16))
        place.settle()
    place.engine.locations["B"].clear()
    place.engine.memory_tier.clear()
    outcome = Within(place).do(Move(location="B", source="small", source_location="A"))
    assert (outcome.state, outcome.tokens, outcome.message) == ("done", 160, "")
    assert (len(place.at("A")), len(place.at("B"))) == (0, 10)


@pytest.mark.parametrize("to", ["A", "Z"])
def test_a_move_within_a_cache_that_makes_no_sense_is_refused(within: Within, to: str) -> None:
    with pytest.raises((InvalidQuery, UnknownName), match=r"are the same|Known: Local.*, A"):
        within.move("A", to)


def test_clearing_a_tier_waits_for_its_store_and_says_when_it_fails(within: Within) -> None:
    assert within.do(Clear(location="A")).tokens == 40
    assert within.place.at("A") == set()
    store = within.place.stores[1]
    assert isinstance(store, Dict)
    store.broken = BackendError("read-only file system")
    outcome = within.do(Clear(location="B"))
    assert outcome.state == "failed"
    assert "read-only file system" in outcome.message
