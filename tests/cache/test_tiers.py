"""Tiers below memory: all that is stored goes down, and what is found there comes back."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lmcache_kit.cache.tiers.tier_reader import TierReader
from lmcache_kit.errors import BackendError
from lmcache_kit.keys import pack_tokens
from tests.cache.conftest import Clock
from tests.cache.stores import CHUNK, NAMESPACE, Dict, MakeCache, SharedDict, keys


def test_what_is_stored_goes_to_every_tier(make: MakeCache) -> None:
    cache = make(Dict(), Dict())
    cache.store(range(10))
    for store in cache.stores:
        assert list(store.blobs) == keys(range(10))
    assert cache.stat("chunks", "A") == cache.stat("chunks", "B") == 3
    assert cache.stat("stored_bytes", "A") == 300


class Reporting(Dict):
    """A backend with metrics of its own."""

    reported: Any = {"reconnections_total": 2.0, "chunks": 99.0}

    def metrics(self) -> dict[str, float]:
        return self.reported() if callable(self.reported) else self.reported


def test_a_backend_may_report_metrics_of_its_own_and_none_of_the_tiers(make: MakeCache) -> None:
    cache = make(Reporting())
    cache.store(range(10))
    assert cache.stat("reconnections_total", "A") == 2
    assert cache.stat("chunks", "A") == 3


def test_a_backend_that_cannot_report_its_metrics_disturbs_nothing(make: MakeCache) -> None:
    cache = make(Reporting())
    cache.stores[0].reported = lambda: 1 / 0  # type: ignore[attr-defined]
    cache.store(range(10))
    assert cache.stat("chunks", "A") == 3
    assert cache.hit(range(10)) == 10


def test_what_left_memory_comes_back_from_a_tier(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(10))
    cache.forget_memory()
    assert cache.stat("chunks") == 0
    assert cache.hit(range(10)) == 10
    assert cache.stat("chunks") == 3
    assert cache.stat("promoted_chunks_total") == 3
    assert cache.stat("promoted_bytes_total") == 300


def test_what_came_back_is_not_written_again(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    cache.hit(range(8))
    cache.settle()
    assert cache.stores[0].calls.count("put") == 2


def test_what_came_back_from_one_tier_goes_to_the_others(make: MakeCache) -> None:
    below = Dict()
    first = make(below)
    first.store(range(8))
    first.close()
    again = make(Dict(), Dict(below.blobs))
    assert again.hit(range(8)) == 8
    again.settle()
    assert list(again.stores[0].blobs) == keys(range(8))


def test_only_what_memory_lacks_is_read(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(12))
    cache.forget_memory()
    cache.store(range(4))
    assert cache.hit(range(12)) == 12
    assert cache.stores[0].calls.count("get") == 2


def test_tiers_complete_each_other(make: MakeCache) -> None:
    cache = make(Dict(), Dict())
    cache.store(range(12))
    first, second = cache.stores
    cache.forget_memory()
    cache.tiers[0].delete(keys(range(12))[2:])
    cache.settle()
    del second.blobs[keys(range(12))[0]]
    assert cache.hit(range(12)) == 12
    assert first.calls.count("get") == 2
    assert second.calls.count("get") == 1


def test_a_prompt_that_diverges_inside_a_chunk_uses_the_tokens_before(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    assert cache.hit([0, 1, 2, 3, 4, 5, 99, 7]) == 6


def test_a_tier_is_asked_for_no_less_than_memory_has(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store([0, 1, 2, 3, 4, 5, 6, 7])
    cache.store([0, 1, 2, 3, 4, 5, 66])
    assert cache.hit([0, 1, 2, 3, 4, 5, 66, 77]) == 7
    assert "get" not in cache.stores[0].calls


def test_a_lookup_without_time_takes_what_is_in_memory(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    cache.store(range(4))
    assert cache.hit(range(8), wait_s=0.0) == 4


def test_a_store_that_hangs_costs_a_lookup_its_time_and_the_next_one_nothing(
    make: MakeCache,
) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    cache.stores[0].gate.clear()
    assert cache.hit(range(8), wait_s=0.01) == 0
    assert cache.stat("promotions_late_total") == 1
    assert cache.stat("resting", "A") == 1
    assert cache.hit(range(8)) == 0


def test_a_store_that_fails_is_a_miss_and_is_left_alone_for_a_while(
    make: MakeCache, clock: Clock
) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    cache.stores[0].broken = BackendError("no route to host")
    assert cache.hit(range(8)) == 0
    calls = len(cache.stores[0].calls)
    assert cache.hit(range(8)) == 0
    assert len(cache.stores[0].calls) == calls
    cache.stores[0].broken = None
    clock.now += 1.5
    assert cache.hit(range(8)) == 8
    assert cache.stat("failures_total", "A") == 1


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "I/O"), RuntimeError("?")])
def test_whatever_a_store_raises_serving_goes_on(make: MakeCache, error: Exception) -> None:
    cache = make(Dict())
    cache.stores[0].broken = error
    cache.store(range(8))
    assert cache.hit(range(8)) == 8
    assert cache.stat("failures_total", "A") == 1
    assert cache.stat("write_failed_total", "A") == 2
    assert cache.stat("refused_total", "A") == 0


@pytest.mark.parametrize("tamper", ["data", "meta", "swap", "cut", "none"])
def test_wrong_bytes_are_a_miss_and_go(make: MakeCache, tamper: str) -> None:
    cache = make(Dict())
    cache.store(range(12))
    cache.forget_memory()
    blobs = cache.stores[0].blobs
    first, second, third = keys(range(12))
    meta, data = blobs[second]
    blobs[second] = {
        "data": (meta, b"?" + data[1:]),
        "meta": (meta[:-1] + b"?", data),
        "swap": blobs[third],
        "cut": (meta, data[:-1]),
        "none": (b"", b""),
    }[tamper]
    assert cache.hit(range(12)) == 4
    assert cache.stat("corrupt_total", "A") == 1
    cache.settle()
    assert list(blobs) == [first, third]
    cache.store(range(12))
    cache.forget_memory()
    assert cache.hit(range(12)) == 12


def test_what_lies_there_is_found_after_a_restart(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(10))
    cache.close()
    again = make(Dict(cache.stores[0].blobs))
    assert again.stat("chunks", "A") == 3
    assert again.hit(range(10)) == 10


def test_what_is_damaged_is_passed_over_at_a_restart(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(10))
    cache.close()
    blobs = cache.stores[0].blobs
    blobs[keys(range(10))[1]] = (b"noise", b"")
    again = make(Dict(blobs))
    again.settle()
    assert again.stat("chunks", "A") == 2
    assert keys(range(10))[1] not in blobs
    assert again.hit(range(10)) == 4


def test_a_store_that_is_down_at_the_start_is_learnt_later(make: MakeCache, clock: Clock) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.close()
    down = Dict(cache.stores[0].blobs)
    down.broken = BackendError("refused")
    again = make(down)
    assert again.hit(range(8)) == 0
    down.broken = None
    clock.now += 60
    again.engine.expire()
    again.settle()
    assert again.hit(range(8)) == 8


def test_a_full_tier_lets_go_of_what_was_used_least_and_followed_by_none(make: MakeCache) -> None:
    cache = make(Dict(capacity=400))
    cache.store(range(8))
    cache.store(range(100, 108))
    cache.hit(range(8))
    cache.forget_memory()
    cache.hit(range(8))
    cache.store(range(200, 204))
    assert list(cache.stores[0].blobs) == keys(range(8)) + keys(range(100, 104)) + keys(
        range(200, 204)
    )
    assert cache.stat("evicted_chunks_total", "A") == 1


def test_what_cannot_fit_is_refused_and_nothing_leaves_for_it(make: MakeCache) -> None:
    cache = make(Dict(capacity=150))
    cache.store(range(4))
    cache.store(range(100, 104), nbytes=200)
    assert list(cache.stores[0].blobs) == keys(range(4))
    assert cache.stat("refused_total", "A") == 1


def test_pinned_chunks_stay_in_a_full_tier(make: MakeCache) -> None:
    cache = make(Dict(capacity=400))
    cache.store(range(8))
    [tier] = cache.tiers
    there, pinned = tier.pin(None, pack_tokens(range(8)), "mine")
    assert (there.chunks, pinned.chunks) == (2, 2)
    for start in range(100, 500, 100):
        cache.store(range(start, start + 4))
    assert set(keys(range(8))) <= set(cache.stores[0].blobs)
    [pin] = tier.pins()
    assert (pin.location, pin.tokens, pin.nbytes) == ("A", 8, 200)
    assert tier.unpin(None, None, "mine").chunks == 2


def test_clearing_a_tier_removes_from_the_store_and_leaves_memory(make: MakeCache) -> None:
    cache = make(Dict(), Dict())
    cache.store(range(8))
    gone, kept = cache.tiers[0].clear(None, pack_tokens(range(8)))
    assert (gone.tokens, kept.tokens) == (8, 0)
    assert cache.stores[0].blobs == {}
    assert len(cache.stores[1].blobs) == 2
    assert cache.stat("chunks") == 2


def test_clearing_a_head_in_a_tier_clears_what_follows_it(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(12))
    cache.store(range(100, 104))
    gone, _ = cache.tiers[0].clear(None, pack_tokens(range(4)))
    assert (gone.tokens, gone.chunks) == (12, 3)
    assert list(cache.stores[0].blobs) == keys(range(100, 104))
    assert cache.hit(range(12)) == 12  # from memory, which was not cleared


def test_what_a_store_does_not_let_go_of_is_not_served_and_goes_later(
    make: MakeCache, clock: Clock
) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    cache.stores[0].broken = BackendError("read-only")
    with pytest.raises(BackendError, match="read-only"):
        cache.tiers[0].clear()
    cache.stores[0].broken = None
    clock.now += 60
    assert cache.hit(range(8)) == 0
    cache.engine.expire()
    cache.settle()
    assert cache.stores[0].blobs == {}


def test_others_find_in_a_shared_store_what_one_has_put_there(make: MakeCache) -> None:
    blobs: dict[bytes, tuple[bytes, bytes]] = {}
    one, other = make(SharedDict(blobs)), make(SharedDict(blobs))
    one.store(range(10))
    assert other.stat("chunks", "A") == 0
    assert other.hit(range(10)) == 10
    assert other.stat("chunks", "A") == 3


def test_what_others_have_put_into_a_shared_store_is_not_written_again(make: MakeCache) -> None:
    blobs: dict[bytes, tuple[bytes, bytes]] = {}
    one, other = make(SharedDict(blobs)), make(SharedDict(blobs))
    one.store(range(10))
    other.store(range(10))
    assert other.stores[0].calls.count("put") == 0
    assert other.stat("chunks", "A") == 3


def test_what_others_removed_from_a_shared_store_is_a_miss_and_dropped(make: MakeCache) -> None:
    cache = make(SharedDict())
    cache.store(range(8))
    cache.forget_memory()
    cache.stores[0].blobs.clear()
    assert cache.hit(range(8)) == 0
    assert (
        cache.stat("chunks", "A") <= 1
    )  # the second one may have been asked for, ahead of its turn


def test_nothing_is_evicted_from_a_shared_store(make: MakeCache) -> None:
    cache = make(SharedDict(capacity=200))
    cache.store(range(8))
    cache.store(range(100, 104))
    assert list(cache.stores[0].blobs) == keys(range(8))
    assert cache.stat("refused_total", "A") == 1


def test_of_a_shared_store_no_more_is_known_than_there_is_room_for(make: MakeCache) -> None:
    cache = make(SharedDict(), memory=5000)
    [tier] = cache.tiers
    tier.store.max_entries = 4
    for start in range(0, 1000, 100):
        cache.store(range(start, start + 8))
    assert cache.stat("chunks", "A") == 4
    assert len(cache.stores[0].blobs) == 20
    cache.forget_memory()
    assert [cache.hit(range(start, start + 8)) for start in range(0, 1000, 100)] == [8] * 10
    cache.settle()
    assert len(cache.stores[0].blobs) == 20


def test_memory_that_is_full_of_leases_ends_what_comes_back(make: MakeCache) -> None:
    cache = make(Dict(), memory=300)
    cache.store(range(12))
    cache.forget_memory()
    cache.store(range(100, 104))
    held = cache.engine.lookup(NAMESPACE, pack_tokens(range(100, 104)), CHUNK, 1, "reader")
    assert cache.hit(range(12)) == 8
    cache.engine.release(held.lease, None)


def test_lookups_of_the_same_prompt_at_once_find_all_of_it(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make(Dict(), memory=2000)
    cache.store(range(40))
    cache.forget_memory()
    fill = TierReader._fill

    def slowly(*call: Any) -> str:
        threading.Event().wait(0.01)
        return fill(*call)

    monkeypatch.setattr(TierReader, "_fill", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: cache.hit(range(40)), range(8))) == [40] * 8
    assert cache.stat("promoted_chunks_total") == 10


def test_an_owner_that_died_while_chunks_came_leaves_no_lease(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(8))
    cache.forget_memory()
    cache.stores[0].gate.clear()
    ready = threading.Event()
    search = cache.engine.begin_lookup(
        NAMESPACE, pack_tokens(range(8)), CHUNK, 1, "gone", ready.set
    )
    assert search.waiting
    cache.engine.drop_owner("gone")
    cache.stores[0].gate.set()
    assert ready.wait(10)
    assert cache.engine.finish_lookup(search).chunks == ()
    assert cache.stat("leases") == 0


def test_what_came_back_may_leave_again(make: MakeCache) -> None:
    cache = make(Dict(), memory=300)
    for start in range(0, 1000, 100):
        cache.store(range(start, start + 12))
    for start in [*range(0, 1000, 100), *range(0, 1000, 200)]:
        assert cache.hit(range(start, start + 12)) == 12


def test_a_tier_closes_after_what_waits_is_written(make: MakeCache) -> None:
    cache = make(Dict())
    cache.store(range(40))
    cache.close()
    assert len(cache.stores[0].blobs) == 10
    assert cache.stores[0].closed
    with pytest.raises(BackendError, match="A is closed"):
        cache.tiers[0].clear()


def test_what_has_gone_from_a_store_is_dropped_from_its_index_and_written_again(
    make: MakeCache, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(Dict())
    cache.store(range(12))
    for key in keys(range(12))[1:]:
        del cache.stores[0].blobs[key]
    clock.now += 60
    cache.engine.expire()
    cache.settle()
    assert cache.stat("chunks", "A") == 1
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "A: 2 of 3 chunks have gone" in warning
    cache.forget_memory()
    cache.store(range(12))
    assert list(cache.stores[0].blobs) == keys(range(12))


def test_a_store_that_has_everything_is_not_asked_for_each_chunk(
    make: MakeCache, clock: Clock
) -> None:
    cache = make(Dict(), SharedDict())
    cache.store(range(12))
    for store in cache.stores:
        store.calls.clear()
    for _ in range(10):
        clock.now += 1
        cache.engine.expire()
        cache.settle()
    assert cache.stores[0].calls == ["usage", "usage"]
    assert cache.stores[1].calls == []


def test_writes_that_a_resting_store_misses_are_no_refusals(make: MakeCache, clock: Clock) -> None:
    cache = make(SharedDict())
    cache.stores[0].broken = BackendError("down")
    cache.store(range(12))
    assert cache.stat("write_failed_total", "A") == 3
    assert (cache.stat("refused_total", "A"), cache.stat("failures_total", "A")) == (0, 1)


def test_damage_that_a_backend_notices_counts_as_corrupt(make: MakeCache) -> None:
    class Noticing(Dict):
        def damaged_blobs(self) -> int:
            return 3

    cache = make(Noticing())
    assert cache.stat("corrupt_total", "A") == 3
