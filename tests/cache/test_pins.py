"""Pins, and clearing by tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index import holds
from lmcache_kit.cache.records import Selected, StoreItem
from lmcache_kit.keys import chain, pack_tokens

NAMESPACE = bytes(range(32))
OTHER = bytes(32)
CHUNK = 4

MakeEngine = Callable[..., CacheEngine]


class Time(Protocol):
    now: float


def items(tokens: Sequence[int], nbytes: int = 100, space: bytes = NAMESPACE) -> list[StoreItem]:
    packed = pack_tokens(tokens)
    return [
        StoreItem(link.parent, packed[link.start * 4 : link.end * 4], nbytes)
        for link in chain(space, packed, CHUNK)
    ]


def keys(tokens: Sequence[int]) -> list[bytes]:
    return [link.key for link in chain(NAMESPACE, pack_tokens(tokens), CHUNK)]


def store(
    engine: CacheEngine, tokens: Sequence[int], nbytes: int = 100, space: bytes = NAMESPACE
) -> None:
    grants = engine.allocate(space, 0, 1, CHUNK, items(tokens, nbytes, space), "worker")
    written = [(grant.ticket, 7) for grant in grants if grant.status == "granted"]
    assert engine.commit(written, "worker") == len(written)


def hit(engine: CacheEngine, tokens: Sequence[int], space: bytes = NAMESPACE) -> int:
    match = engine.lookup(space, pack_tokens(tokens), CHUNK, 1, "scheduler")
    engine.release(match.lease, None)
    return match.chunks[-1].end if match.chunks else 0


def pin(
    engine: CacheEngine, tokens: Sequence[int], pin_id: str = "p", ttl_s: float | None = None
) -> Selected:
    return engine.memory_tier.pin([NAMESPACE], pack_tokens(tokens), pin_id, ttl_s=ttl_s)[1]


def unpin(engine: CacheEngine, tokens: Sequence[int]) -> Selected:
    return engine.memory_tier.unpin([NAMESPACE], pack_tokens(tokens))


def clear(engine: CacheEngine, tokens: Sequence[int], force: bool = False) -> Selected:
    return engine.memory_tier.clear([NAMESPACE], pack_tokens(tokens), force=force)[0]


def crowd(engine: CacheEngine, chunks: int = 30) -> None:
    """Store so much that everything else that may leave does."""
    for first in range(1000, 1000 + chunks):
        store(engine, [first])


# Pins.


def test_what_is_pinned_stays_while_all_else_is_evicted(make_engine: MakeEngine) -> None:
    engine = make_engine(1000)
    store(engine, range(10))
    assert pin(engine, range(10)) == Selected(tokens=10, chunks=3, nbytes=300)
    store(engine, range(50, 54))
    crowd(engine)
    assert hit(engine, range(10)) == 10
    assert hit(engine, range(50, 54)) == 0


def test_what_is_unpinned_may_leave_again(make_engine: MakeEngine) -> None:
    engine = make_engine(1000)
    store(engine, range(10))
    pin(engine, range(10))
    assert unpin(engine, range(10)) == Selected(10, 3, 300)
    crowd(engine)
    assert hit(engine, range(10)) == 0


def test_a_pin_ends_when_its_time_is_over(make_engine: MakeEngine, clock: Time) -> None:
    engine = make_engine(1000)
    store(engine, range(10))
    pin(engine, range(10), ttl_s=30)
    [info] = engine.memory_tier.pins()
    assert (info.tokens, info.chunks, info.nbytes, info.expires_in_s) == (10, 3, 300, 30)
    clock.now += 30
    assert engine.memory_tier.pins() == []
    assert engine.stats()["expired_pins_total"] == 1
    crowd(engine)
    assert hit(engine, range(10)) == 0


def test_a_pin_of_no_end_has_none(make_engine: MakeEngine, clock: Time) -> None:
    engine = make_engine(1000)
    store(engine, [1])
    pin(engine, [1])
    clock.now += 1e9
    assert engine.memory_tier.pins()[0].expires_in_s is None


def test_a_pin_counts_the_tokens_that_it_holds_to_the_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(10))
    assert pin(engine, range(9)).tokens == 9
    assert pin(engine, [*range(5), 99, 99]).tokens == 5
    assert pin(engine, [99]).tokens == 0


def test_a_pin_of_nothing_is_no_pin(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert pin(engine, range(4)) == Selected()
    assert engine.memory_tier.pins() == []


def test_over_the_budget_the_longest_prefix_that_fits_is_pinned(make_engine: MakeEngine) -> None:
    engine = make_engine(1000)
    store(engine, range(32))
    there, pinned = engine.memory_tier.pin([NAMESPACE], pack_tokens(range(32)), "p")
    assert there == Selected(32, 8, 800)
    assert pinned == Selected(20, 5, 500)
    assert engine.stats()["pinned_bytes"] == engine.memory_tier.pin_budget_bytes == 500


def test_a_chunk_that_is_pinned_twice_counts_once_against_the_budget(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(1000)
    store(engine, range(32))
    pin(engine, range(20), "a")
    assert pin(engine, range(20), "b").tokens == 20
    assert engine.stats()["pinned_bytes"] == 500


def test_a_chunk_is_held_until_its_last_pin_ends(make_engine: MakeEngine) -> None:
    engine = make_engine(1000)
    store(engine, range(10))
    pin(engine, range(10), "a")
    pin(engine, range(8), "b")
    assert engine.memory_tier.unpin(None, None, "a") == Selected(10, 3, 300)
    crowd(engine)
    assert hit(engine, range(10)) == 8


def test_a_pin_of_the_same_id_takes_the_place_of_the_first(make_engine: MakeEngine) -> None:
    engine = make_engine(1000)
    store(engine, range(10))
    pin(engine, range(10))
    pin(engine, range(4))
    assert [info.tokens for info in engine.memory_tier.pins()] == [4]
    crowd(engine)
    assert hit(engine, range(10)) == 4


def test_unpinning_a_prompt_leaves_the_pins_of_longer_ones_and_of_others(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    for tokens in (range(6), range(12), [*range(4), 9, 9]):
        store(engine, tokens)
    pin(engine, range(6), "short")
    pin(engine, range(12), "long")
    pin(engine, [*range(4), 9, 9], "other")
    assert unpin(engine, range(6)).tokens == 6
    assert [info.pin_id for info in engine.memory_tier.pins()] == ["long", "other"]
    assert unpin(engine, range(40)).tokens == 12
    assert [info.pin_id for info in engine.memory_tier.pins()] == ["other"]


def test_all_pins_can_be_ended_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(8))
    store(engine, [50], space=OTHER)
    pin(engine, range(8), "a")
    engine.memory_tier.pin([OTHER], pack_tokens([50]), "b")
    assert engine.memory_tier.unpin([OTHER], None) == Selected(1, 1, 100)
    assert engine.memory_tier.unpin(None, None) == Selected(8, 2, 200)
    assert engine.memory_tier.pins() == []


def test_a_corrupt_chunk_goes_although_it_is_pinned(make_engine: MakeEngine) -> None:
    engine = make_engine(1000)
    store(engine, range(8))
    pin(engine, range(8))
    keys = [link.key for link in chain(NAMESPACE, pack_tokens(range(8)), CHUNK)]
    assert engine.drop_corrupt(keys[1])
    [info] = engine.memory_tier.pins()
    assert (info.tokens, info.nbytes) == (4, 100)
    assert engine.stats()["pinned_bytes"] == 100
    assert unpin(engine, range(8)) == Selected(4, 1, 100)


def test_stores_are_refused_when_nothing_but_pinned_chunks_could_leave(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(1000)
    store(engine, range(20))
    pin(engine, range(20))
    engine.memory_tier.clear()
    item = StoreItem(NAMESPACE[:16], pack_tokens([77]), 501)
    assert engine.allocate(NAMESPACE, 0, 1, CHUNK, [item], "w")[0].status == "refused"
    item = StoreItem(NAMESPACE[:16], pack_tokens([77]), 500)
    assert engine.allocate(NAMESPACE, 0, 1, CHUNK, [item], "w")[0].status == "granted"


def test_there_may_not_be_more_pins_than_anybody_needs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "MAX_PINS", 2)
    engine = make_engine()
    store(engine, range(8))
    pin(engine, range(8), "a")
    pin(engine, range(8), "b")
    with pytest.raises(ValueError, match="there are 2 pins already; unpin some"):
        pin(engine, range(8), "c")
    assert pin(engine, range(8), "b").tokens == 8


# Clearing.


def test_clearing_a_prompt_forgets_its_chunks_and_no_others(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(10))
    store(engine, range(50, 58))
    assert clear(engine, range(10)) == Selected(10, 3, 300)
    assert hit(engine, range(10)) == 0
    assert hit(engine, range(50, 58)) == 8
    assert engine.stats()["allocated_bytes"] == 200
    assert engine.stats()["cleared_chunks_total"] == 3


def test_clearing_a_prompt_forgets_chunks_that_go_on_after_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for length in (5, 6, 7):
        store(engine, range(length))
    assert clear(engine, range(6)) == Selected(4 + 1 + 2 + 3, 4, 400)
    assert hit(engine, range(7)) == 0


def test_clearing_a_prompt_leaves_chunks_that_go_on_otherwise(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, [1, 2, 3, 4])
    store(engine, [1, 2, 8, 8])
    assert clear(engine, [1, 2, 3]) == Selected(4, 1, 100)
    assert hit(engine, [1, 2, 8, 8]) == 4


def test_clearing_reaches_behind_a_hole(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(12))
    engine.drop_corrupt(keys(range(12))[0])
    assert clear(engine, range(12)) == Selected(8, 2, 200)


def test_clearing_the_head_of_prompts_clears_all_that_follow_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(12))
    store(engine, [*range(6), 70, 80, 90])
    store(engine, range(100, 108))
    assert clear(engine, range(4)) == Selected(4 + 8 + 5, 5, 500)
    assert engine.stats()["allocated_bytes"] == 200
    assert hit(engine, range(100, 108)) == 8


def test_clearing_a_head_gives_up_what_is_being_stored_behind_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(4))
    [_, item] = items(range(8))
    [grant] = engine.allocate(NAMESPACE, 0, 1, CHUNK, [item], "worker")
    assert clear(engine, range(4)) == Selected(4, 1, 100)
    assert engine.commit([(grant.ticket, 0)], "worker") == 0
    assert engine.stats()["allocated_bytes"] == 0


def test_clearing_a_namespace_gives_up_what_is_being_stored_there(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(4))
    [_, item] = items(range(8))
    [grant] = engine.allocate(NAMESPACE, 0, 1, CHUNK, [item], "worker")
    assert engine.memory_tier.clear([OTHER])[0] == Selected()
    assert engine.memory_tier.clear([NAMESPACE])[0] == Selected(4, 1, 100)
    assert engine.commit([(grant.ticket, 0)], "worker") == 0


def test_the_head_of_a_pinned_prompt_stays(make_engine: MakeEngine) -> None:
    """Also where the head was stored anew after the pin, so that it is not pinned itself."""
    engine = make_engine()
    store(engine, range(12))
    pin(engine, range(8))
    engine.drop_corrupt(keys(range(8))[0])
    store(engine, range(4))
    for tokens in (pack_tokens(range(4)), None):
        gone, kept = engine.memory_tier.clear([NAMESPACE], tokens)
        assert hit(engine, range(8)) == 8
        assert kept.tokens == (4 if tokens else 8)
    assert gone == Selected(4, 1, 100)
    assert engine.memory_tier.clear([NAMESPACE], pack_tokens(range(4)), force=True)[0].tokens == 8
    assert engine.stats()["allocated_bytes"] == 0


def test_pinned_chunks_are_cleared_only_by_force(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(12))
    pin(engine, range(8))
    gone, kept = engine.memory_tier.clear([NAMESPACE], pack_tokens(range(12)))
    assert (gone, kept) == (Selected(4, 1, 100), Selected(8, 2, 200))
    assert engine.memory_tier.clear() == (Selected(), Selected(8, 2, 200))
    assert hit(engine, range(12)) == 8
    assert engine.memory_tier.clear(force=True) == (Selected(8, 2, 200), Selected())
    assert engine.stats()["allocated_bytes"] == 0


def test_clearing_one_namespace_leaves_the_others(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(8))
    store(engine, range(8), space=OTHER)
    assert engine.memory_tier.clear([OTHER])[0] == Selected(8, 2, 200)
    assert hit(engine, range(8)) == 8


def test_memory_of_a_cleared_chunk_is_freed_when_its_reader_is_done(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, range(4))
    match = engine.lookup(NAMESPACE, pack_tokens(range(4)), CHUNK, 1, "reader")
    assert clear(engine, range(4)).chunks == 1
    assert engine.stats()["allocated_bytes"] == 100
    engine.release(match.lease, None)
    assert engine.stats()["allocated_bytes"] == 0
