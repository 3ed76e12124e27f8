"""Threads wait for changes in memory: a store that ends, a hold that is released."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.keys import chunk_key, pack_tokens

NAMESPACE = bytes(range(32))
TOKENS = pack_tokens(range(4))
KEY = chunk_key(NAMESPACE, NAMESPACE[:16], TOKENS)
WAIT_S = 30.0


def begin_store(engine: CacheEngine) -> int:
    [grant] = engine.allocate(
        NAMESPACE, 0, 1, 4, [StoreItem(NAMESPACE[:16], TOKENS, 100)], "writer"
    )
    return grant.ticket


def test_a_store_that_is_committed_wakes_who_waits_for_it(
    make_engine: Callable[..., CacheEngine],
) -> None:
    engine = make_engine()
    ticket = begin_store(engine)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.memory_tier.wait_until_stored, [KEY], WAIT_S)
        engine.commit([(ticket, 0)], "writer")
        assert waiting.result()


def test_a_store_that_is_abandoned_wakes_who_waits_for_it(
    make_engine: Callable[..., CacheEngine],
) -> None:
    engine = make_engine()
    ticket = begin_store(engine)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.memory_tier.wait_until_stored, [KEY], WAIT_S)
        engine.abandon([ticket], "writer")
        assert waiting.result()


def test_a_wait_for_a_store_that_does_not_end_is_over_in_time(
    make_engine: Callable[..., CacheEngine],
) -> None:
    engine = make_engine()
    begin_store(engine)
    assert not engine.memory_tier.wait_until_stored([KEY], 0.01)


def test_a_lease_that_is_released_is_a_change(make_engine: Callable[..., CacheEngine]) -> None:
    engine = make_engine()
    engine.commit([(begin_store(engine), 0)], "writer")
    match = engine.lookup(NAMESPACE, TOKENS, 4, 1, "reader")
    version = engine.memory_tier.version
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.memory_tier.wait_for_change, version, WAIT_S)
        engine.release(match.lease, None)
        assert waiting.result()


def test_a_reference_that_is_released_is_a_change(make_engine: Callable[..., CacheEngine]) -> None:
    engine = make_engine()
    engine.commit([(begin_store(engine), 0)], "writer")
    engine.memory_tier.references.acquire([KEY], "move")
    version = engine.memory_tier.version
    engine.memory_tier.references.release("move")
    assert engine.memory_tier.wait_for_change(version, 0)


def test_nothing_changes_for_who_waits_in_vain(make_engine: Callable[..., CacheEngine]) -> None:
    tier = make_engine().memory_tier
    assert not tier.wait_for_change(tier.version, 0.01)
