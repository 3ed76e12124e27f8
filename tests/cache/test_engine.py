from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable, Sequence
from threading import Barrier, Thread
from typing import Protocol

import pytest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import FIFO, LRU
from lmcache_kit.cache.records import Grant, Match, StoredChunk, StoreItem
from lmcache_kit.keys import ChunkKey, chain, pack_tokens

NAMESPACE = bytes(range(32))
CHUNK = 4

MakeEngine = Callable[..., CacheEngine]


class Time(Protocol):
    now: float


def items_of(tokens: Sequence[int], nbytes: int = 100, space: bytes = NAMESPACE) -> list[StoreItem]:
    packed = pack_tokens(tokens)
    return [
        StoreItem(link.parent, packed[link.start * 4 : link.end * 4], nbytes)
        for link in chain(space, packed, CHUNK)
    ]


def keys_of(tokens: Sequence[int], space: bytes = NAMESPACE) -> list[ChunkKey]:
    return [link.key for link in chain(space, pack_tokens(tokens), CHUNK)]


def allocate(
    engine: CacheEngine,
    tokens: Sequence[int],
    nbytes: int = 100,
    *,
    owner: Hashable = "worker",
    rank: int = 0,
    world: int = 1,
    space: bytes = NAMESPACE,
) -> list[Grant]:
    return engine.allocate(space, rank, world, CHUNK, items_of(tokens, nbytes, space), owner)


def store(
    engine: CacheEngine,
    tokens: Sequence[int],
    nbytes: int = 100,
    *,
    world: int = 1,
    space: bytes = NAMESPACE,
) -> None:
    for rank in range(world):
        grants = allocate(engine, tokens, nbytes, rank=rank, world=world, space=space)
        written = [(grant.ticket, 7) for grant in grants if grant.status == "granted"]
        assert engine.commit(written, "worker") == len(written)


def find(
    engine: CacheEngine,
    tokens: Sequence[int],
    *,
    world: int = 1,
    owner: Hashable = "scheduler",
    space: bytes = NAMESPACE,
) -> Match:
    return engine.lookup(space, pack_tokens(tokens), CHUNK, world, owner)


def hit(
    engine: CacheEngine, tokens: Sequence[int], world: int = 1, space: bytes = NAMESPACE
) -> int:
    """How many tokens are stored; holds nothing."""
    match = find(engine, tokens, world=world, space=space)
    engine.release(match.lease, None)
    return match.chunks[-1].end if match.chunks else 0


def statuses(grants: Sequence[Grant]) -> list[str]:
    return [grant.status for grant in grants]


class Recorder:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, ChunkKey]] = []

    def added(self, chunk: StoredChunk) -> None:
        self.heard.append(("added", chunk.key))

    def removed(self, key: ChunkKey) -> None:
        self.heard.append(("removed", key))


# Finding.


def test_nothing_is_found_in_an_empty_cache(make_engine: MakeEngine) -> None:
    assert find(make_engine(), [1, 2, 3]) == Match(0, ())


def test_a_stored_prompt_is_found_whole_with_its_partial_last_chunk(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, range(10))
    match = find(engine, range(10))
    assert [(c.start, c.usable, c.tokens) for c in match.chunks] == [
        (0, 4, 4),
        (4, 4, 4),
        (8, 2, 2),
    ]
    assert [c.key for c in match.chunks] == keys_of(range(10))
    assert all(c.extents[0].checksum == 7 for c in match.chunks)


def test_a_longer_prompt_uses_a_stored_partial_chunk(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(6))
    assert hit(engine, range(20)) == 6


def test_a_shorter_prompt_uses_the_first_tokens_of_a_stored_chunk(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, range(8))
    assert hit(engine, range(7)) == 7


def test_a_prompt_that_diverges_within_a_chunk_uses_it_up_to_there(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, range(12))
    assert hit(engine, [0, 1, 2, 3, 4, 5, 99, 7, 8, 9, 10, 11]) == 6


def test_of_several_chunks_that_share_a_start_the_longest_match_is_used(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    for tail in ([9, 9, 9, 9], [1, 9, 9, 9], [1, 2, 9, 9], [1, 2], [1, 3, 3, 3], [0, 2, 3, 4]):
        store(engine, tail)
    assert hit(engine, [1, 2, 3, 4]) == 2
    assert hit(engine, [1, 2, 9, 4]) == 3


def test_tokens_above_the_first_byte_match_as_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, [256, 1, 2, 3])
    store(engine, [1, 256, 2, 3])
    assert hit(engine, [257, 1, 2, 3]) == 0
    assert hit(engine, [256, 257]) == 1
    assert hit(engine, [1, 256, 3]) == 2


def test_a_prefix_with_a_hole_ends_at_the_hole(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(12))
    engine.drop_corrupt(keys_of(range(12))[1])
    assert hit(engine, range(12)) == 4


def test_a_hole_that_is_filled_again_gives_the_rest_back(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(12))
    engine.drop_corrupt(keys_of(range(12))[1])
    store(engine, range(12))
    assert hit(engine, range(12)) == 12


def test_namespaces_do_not_see_each_other(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(8))
    assert hit(engine, range(8), space=bytes(32)) == 0


def test_namespaces_with_the_same_root_do_not_see_each_other(make_engine: MakeEngine) -> None:
    engine = make_engine()
    twin = NAMESPACE[:16] + bytes(16)
    store(engine, range(8))
    store(engine, [50], space=twin)
    assert hit(engine, range(8), space=twin) == 0


def test_a_chunk_is_found_once_every_rank_has_committed_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    [first] = allocate(engine, [1, 2, 3], rank=0, world=2)
    engine.commit([(first.ticket, 10)], "worker")
    assert hit(engine, [1, 2, 3], world=2) == 0
    [second] = allocate(engine, [1, 2, 3], rank=1, world=2)
    engine.commit([(second.ticket, 11)], "worker")
    [chunk] = find(engine, [1, 2, 3], world=2).chunks
    assert [extent.checksum for extent in chunk.extents] == [10, 11]
    assert [extent.offset for extent in chunk.extents] == [first.offset, second.offset]


def test_ranks_may_store_payloads_of_different_sizes(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for rank, nbytes in enumerate((100, 60)):
        [grant] = allocate(engine, [1, 2, 3], nbytes, rank=rank, world=2)
        engine.commit([(grant.ticket, 0)], "worker")
    [chunk] = find(engine, [1, 2, 3], world=2).chunks
    assert [extent.nbytes for extent in chunk.extents] == [100, 60]
    assert engine.stats()["requested_bytes"] == 160


# Storing.


def test_what_is_stored_or_being_stored_is_not_stored_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    allocate(engine, [1, 2])
    assert statuses(allocate(engine, [1, 2], owner="another")) == ["present"]
    store(engine, [5, 6])
    assert statuses(allocate(engine, [5, 6])) == ["present"]


def test_a_chunk_named_twice_in_a_batch_is_granted_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    twice = items_of([1, 2]) * 2
    assert statuses(engine.allocate(NAMESPACE, 0, 1, CHUNK, twice, "w")) == ["granted", "present"]


def test_a_ticket_counts_once_and_only_for_its_owner(make_engine: MakeEngine) -> None:
    engine = make_engine()
    [grant] = allocate(engine, [1, 2], owner="mine")
    assert engine.commit([(grant.ticket, 0)], "thief") == 0
    assert engine.abandon([grant.ticket], "thief") == 0
    assert engine.commit([(grant.ticket, 0)], "mine") == 1
    assert engine.commit([(grant.ticket, 0)], "mine") == 0
    assert engine.abandon([grant.ticket, 12345], "mine") == 0


def test_an_abandoned_chunk_frees_its_memory_and_can_be_stored_again(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    [grant] = allocate(engine, [1, 2])
    assert engine.abandon([grant.ticket], "worker") == 1
    assert engine.stats()["requested_bytes"] == 0
    store(engine, [1, 2])
    assert hit(engine, [1, 2]) == 2


def test_what_one_rank_abandons_the_other_rank_stores_in_vain(make_engine: MakeEngine) -> None:
    engine = make_engine()
    [first] = allocate(engine, [1, 2], rank=0, world=2)
    [second] = allocate(engine, [1, 2], rank=1, world=2)
    engine.abandon([second.ticket], "worker")
    assert engine.stats()["requested_bytes"] == 200, "the first rank still writes there"
    assert engine.commit([(first.ticket, 0)], "worker") == 0
    assert engine.stats()["requested_bytes"] == 0


def test_a_dead_owner_leaves_neither_half_stored_chunks_nor_leases(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, [1, 2])
    find(engine, [1, 2], owner="dead")
    allocate(engine, [5, 6], owner="dead")
    allocate(engine, [7, 8], owner="alive")
    engine.drop_owner("dead")
    stats = engine.stats()
    assert (stats["leases"], stats["pending"], stats["chunks"]) == (0, 1, 1)
    assert stats["requested_bytes"] == 200


def test_a_chunk_that_one_rank_never_begins_to_store_goes_after_a_time(
    make_engine: MakeEngine, clock: Time
) -> None:
    engine = make_engine()
    [grant] = allocate(engine, [1, 2], rank=0, world=2)
    engine.commit([(grant.ticket, 0)], "worker")
    clock.now += 99
    engine.expire()
    assert engine.stats()["pending"] == 1
    clock.now += 1
    engine.expire()
    assert engine.stats()["requested_bytes"] == 0


def test_a_rank_that_still_writes_is_waited_for(make_engine: MakeEngine, clock: Time) -> None:
    engine = make_engine()
    [grant] = allocate(engine, [1, 2])
    clock.now += 10_000
    engine.expire()
    assert engine.commit([(grant.ticket, 0)], "worker") == 1


# Making room.


def test_the_least_recently_used_chunk_leaves_first(make_engine: MakeEngine) -> None:
    engine = make_engine(300)
    for token in (1, 2, 3):
        store(engine, [token])
    hit(engine, [1])
    store(engine, [4])
    assert [hit(engine, [token]) for token in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_the_end_of_a_prompt_leaves_before_its_start(make_engine: MakeEngine) -> None:
    engine = make_engine(300)
    store(engine, range(12))
    store(engine, [50])
    store(engine, [51])
    assert hit(engine, range(12)) == 4


def test_a_start_that_prompts_share_stays_while_any_of_them_does(make_engine: MakeEngine) -> None:
    engine = make_engine(300)
    store(engine, [0, 0, 0, 0, 1])
    store(engine, [0, 0, 0, 0, 2])
    store(engine, [50])
    assert hit(engine, [0, 0, 0, 0, 2]) == 5


def test_a_start_that_came_first_still_waits_for_all_that_follow_it(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(300, FIFO())
    store(engine, [0, 0, 0, 0, 1])
    store(engine, [0, 0, 0, 0, 2])
    store(engine, [50], 200)
    assert hit(engine, [0, 0, 0, 0, 2]) == 4


def test_a_found_prefix_is_touched_from_its_end_to_its_start(make_engine: MakeEngine) -> None:
    touched: list[ChunkKey] = []

    class Spy(LRU):
        def touched(self, key: ChunkKey) -> None:
            touched.append(key)

    engine = make_engine(1000, Spy())
    store(engine, range(12))
    hit(engine, range(12))
    assert touched == keys_of(range(12))[::-1]


def test_a_batch_does_not_evict_its_own_chunks_or_what_they_follow(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(300)
    store(engine, range(4))
    assert statuses(allocate(engine, range(16))) == ["present", "granted", "granted", "refused"]
    assert hit(engine, range(16)) == 4


def test_a_leased_chunk_stays_until_each_rank_has_released_it(make_engine: MakeEngine) -> None:
    engine = make_engine(200)
    store(engine, [1, 2], world=2)
    lease = find(engine, [1, 2], world=2).lease
    for rank in (0, 1):
        assert statuses(allocate(engine, [9], 50, space=bytes(32))) == ["refused"]
        assert engine.release(lease, rank)
        assert not engine.release(lease, rank)
    assert statuses(allocate(engine, [9], 50, space=bytes(32))) == ["granted"]


def test_a_lease_can_be_ended_for_all_ranks_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(200)
    store(engine, [1, 2], world=2)
    lease = find(engine, [1, 2], world=2).lease
    assert engine.release(lease, None)
    assert not engine.release(lease, None)
    assert engine.stats()["leases"] == 0


def test_a_lease_ends_after_its_time(make_engine: MakeEngine, clock: Time) -> None:
    engine = make_engine()
    store(engine, [1, 2])
    find(engine, [1, 2])
    clock.now += 99
    assert engine.expire() == 0
    clock.now += 1
    assert engine.expire() == 1
    assert engine.stats()["expired_leases_total"] == 1


def test_a_late_lease_does_not_keep_a_store_waiting(make_engine: MakeEngine, clock: Time) -> None:
    engine = make_engine(100)
    store(engine, [1, 2])
    find(engine, [1, 2])
    clock.now += 100
    assert statuses(allocate(engine, [3])) == ["granted"]


def test_a_chunk_larger_than_the_memory_is_refused_and_counted(make_engine: MakeEngine) -> None:
    engine = make_engine(300)
    store(engine, [1])
    assert statuses(allocate(engine, [2], 301)) == ["refused"]
    assert statuses(allocate(engine, [3], 101, world=3, space=bytes(32))) == ["refused"]
    assert engine.stats()["refused_too_large_total"] == 2
    assert hit(engine, [1]) == 1


def test_a_refusal_costs_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(500)
    for token in (1, 2, 3, 4, 5):
        store(engine, [token])
    for token in (2, 4):
        find(engine, [token])
    # 300 bytes may leave, but not next to each other.
    assert statuses(allocate(engine, [9], 200)) == ["refused"]
    stats = engine.stats()
    assert (stats["chunks"], stats["refused_full_total"]) == (5, 1)
    assert stats["evicted_chunks_total"] == 0


def test_what_follows_a_refused_chunk_is_refused_too(make_engine: MakeEngine) -> None:
    engine = make_engine(300)
    first, second = items_of(range(5))
    items = [first._replace(nbytes=301), second]
    assert statuses(engine.allocate(NAMESPACE, 0, 1, CHUNK, items, "w")) == ["refused", "refused"]


def test_room_for_all_ranks_is_set_aside_with_the_first(make_engine: MakeEngine) -> None:
    engine = make_engine(500)
    first = allocate(engine, range(12), rank=0, world=2)
    second = allocate(engine, range(12), rank=1, world=2)
    assert statuses(first) == statuses(second) == ["granted", "granted", "refused"]


def test_scattered_holes_are_joined_by_moving_the_cheapest_neighbours_out(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(600)
    for token in (1, 2, 3, 4, 5, 6):
        store(engine, [token])
    for token in (6, 4, 2):  # 1, 3 and 5 are the next to leave
        hit(engine, [token])
    assert statuses(allocate(engine, [9], 200)) == ["granted"]
    stats = engine.stats()
    assert stats["evicted_for_space_total"] == 1
    assert stats["evicted_chunks_total"] == 3


# The end of things.


def test_a_corrupt_chunk_that_is_being_read_is_gone_at_once_and_freed_later(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, [1, 2])
    lease = find(engine, [1, 2]).lease
    assert engine.drop_corrupt(keys_of([1, 2])[0])
    assert hit(engine, [1, 2]) == 0
    assert engine.stats()["requested_bytes"] == 100
    engine.release(lease, 0)
    assert engine.stats()["requested_bytes"] == 0
    assert engine.stats()["corrupt_total"] == 1


def test_a_chunk_that_is_not_here_cannot_be_corrupt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    allocate(engine, [1, 2])
    assert not engine.drop_corrupt(keys_of([1, 2])[0]), "it is not stored yet"
    assert not engine.drop_corrupt(bytes(16))


def test_clearing_forgets_everything_and_keeps_memory_in_use(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, [1, 2])
    store(engine, [3, 4])
    lease = find(engine, [1, 2]).lease
    [writing] = allocate(engine, [5, 6])
    assert engine.memory_tier.clear()[0].chunks == 2
    assert [hit(engine, tokens) for tokens in ([1, 2], [3, 4])] == [0, 0]
    assert engine.stats()["requested_bytes"] == 200
    engine.release(lease, 0)
    assert engine.commit([(writing.ticket, 0)], "worker") == 0
    assert engine.stats()["requested_bytes"] == 0


def test_listeners_hear_of_every_chunk_that_comes_or_goes(make_engine: MakeEngine) -> None:
    engine = make_engine(200)
    store(engine, [1])
    recorder = Recorder()
    [known] = engine.memory_tier.subscribe(recorder)
    assert known == StoredChunk(keys_of([1])[0], NAMESPACE[:16], 1, partial=True)
    allocate(engine, [99])
    store(engine, [2, 2, 2, 2])
    engine.drop_corrupt(keys_of([2, 2, 2, 2])[0])
    assert recorder.heard == [
        ("removed", keys_of([1])[0]),
        ("added", keys_of([2, 2, 2, 2])[0]),
        ("removed", keys_of([2, 2, 2, 2])[0]),
    ]
    engine.memory_tier.unsubscribe(recorder)
    store(engine, [3])
    assert len(recorder.heard) == 3


def test_a_snapshot_has_what_is_complete(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(5))
    allocate(engine, [99])
    seen: list[StoredChunk] = []
    engine.memory_tier.snapshot(seen.extend)
    assert [(chunk.tokens, chunk.partial) for chunk in seen] == [(4, False), (1, True)]


def test_closing_twice_is_safe_and_nothing_is_found_any_more(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, [1])
    engine.close()
    engine.close()
    assert hit(engine, [1]) == 0


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"namespace": b"short"}, "a namespace digest has 32 bytes, this one has 5"),
        ({"rank": 2}, "rank is 2; it must be 0 to 1"),
        ({"rank": -1}, "rank is -1"),
        ({"world_size": 0}, "world_size is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": 1 << 20}, "chunk_size is 1048576"),
        ({"parent": b"x"}, "item 1: a parent key has 16 bytes, this one has 1"),
        ({"tokens": b"12345"}, "item 1: tokens: 5 bytes"),
        ({"tokens": b""}, "item 1: number of tokens is 0; it must be 1 to 4"),
        ({"tokens": bytes(20)}, "item 1: number of tokens is 5; it must be 1 to 4"),
        ({"nbytes": 0}, "item 1: nbytes is 0"),
        ({"nbytes": -5}, "item 1: nbytes is -5"),
    ],
)
def test_a_store_that_makes_no_sense_is_an_error_and_changes_nothing(
    make_engine: MakeEngine, change: dict[str, object], message: str
) -> None:
    engine = make_engine()
    good = StoreItem(NAMESPACE[:16], pack_tokens([1]), 10)
    bad = StoreItem(**{**good._asdict(), **{k: change[k] for k in good._fields if k in change}})
    request: dict[str, object] = {
        "namespace": NAMESPACE,
        "rank": 0,
        "world_size": 2,
        "chunk_size": CHUNK,
        "items": [good, bad],
        "owner": "w",
    }
    request.update({k: v for k, v in change.items() if k in request})
    with pytest.raises(ValueError, match=message):
        engine.allocate(**request)  # type: ignore[arg-type]
    assert engine.stats()["requested_bytes"] == 0


def test_too_many_items_are_an_error(make_engine: MakeEngine) -> None:
    item = StoreItem(NAMESPACE[:16], pack_tokens([1]), 10)
    with pytest.raises(ValueError, match="number of items is 65537"):
        make_engine().allocate(NAMESPACE, 0, 1, CHUNK, [item] * 65537, "w")


def test_a_lookup_of_half_a_token_is_an_error(make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="tokens: 6 bytes; packed tokens have 4 bytes each"):
        make_engine().lookup(NAMESPACE, b"123456", CHUNK, 1, "s")


@pytest.mark.parametrize("checksum", [-1, 1 << 64])
def test_a_checksum_that_does_not_fit_is_an_error(make_engine: MakeEngine, checksum: int) -> None:
    engine = make_engine()
    [grant] = allocate(engine, [1])
    with pytest.raises(ValueError, match="is no unsigned 64-bit number"):
        engine.commit([(grant.ticket, checksum)], "worker")
    assert engine.commit([(grant.ticket, 0)], "worker") == 1


def test_one_namespace_has_one_shape(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(4))
    message = "has chunk_size 4 and world_size 1 here; this request says 4 and 2"
    with pytest.raises(ValueError, match=message):
        allocate(engine, range(4), world=2)
    with pytest.raises(ValueError, match=message):
        find(engine, range(4), world=2)


# Threads.


def test_threads_that_store_and_load_at_once_never_read_each_others_bytes() -> None:
    backend = pytest.importorskip("lmcache_kit_cpu_backend.backend")
    memory = backend.LocalCPUBackend(64 * 4096)
    engine = CacheEngine(memory, LRU(), location="x")
    mapped = mmap.mmap(memory.fd, 64 * 4096)
    wrong: list[str] = []
    start = Barrier(4)

    def client(name: int) -> None:
        start.wait()
        for step in range(300):
            tokens = [(name + step) % 5, step % 7, step % 3, 1, step % 11, 2]
            items = items_of(tokens, 4096 * (1 + step % 4))
            keys = keys_of(tokens)
            grants = engine.allocate(NAMESPACE, 0, 1, CHUNK, items, name)
            for key, item, grant in zip(keys, items, grants, strict=True):
                if grant.status == "granted":
                    mapped[grant.offset : grant.offset + 16] = key
                    last = grant.offset + item.nbytes
                    mapped[last - 16 : last] = key
                    engine.commit([(grant.ticket, 0)], name)
            match = engine.lookup(NAMESPACE, pack_tokens(tokens), CHUNK, 1, name)
            for chunk in match.chunks:
                first, last = chunk.extents[0].offset, sum(chunk.extents[0][:2])
                if not mapped[first : first + 16] == mapped[last - 16 : last] == chunk.key:
                    wrong.append(f"{name} at {step}")
            engine.release(match.lease, 0)

    threads = [Thread(target=client, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = engine.stats()
    assert (stats["leases"], stats["writers"], stats["pending"]) == (0, 0, 0)
    assert stats["evicted_chunks_total"] > 0, "there was pressure"
    assert stats["requested_bytes"] == memory.usage().requested_bytes
    assert engine.memory_tier.clear()[0].chunks == stats["chunks"]
    assert memory.usage().allocated_bytes == 0
    mapped.close()
    engine.close()
