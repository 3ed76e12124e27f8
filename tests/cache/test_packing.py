"""Chunks that are encoded in place, found all the same, and decoded for their readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.memory.transcoding import Transcoded
from lmcache_kit.cache.records import Located, Match, StoredChunk, StoreItem
from lmcache_kit.interfaces import ChunkInfo, MemoryBackend, Region, Rope
from lmcache_kit.keys import ChunkKey, chain, pack_tokens
from lmcache_kit.layout import KVLayout
from tests.cache.codecs import Zip

SPACE = bytes(range(32))
CHUNK = 4
FORM = RankLayout(KVLayout("float8_e4m3", 25, 1, 1, "mla"), Rope(2), 3)
"""25 bytes a token, so 100 a chunk."""


class Cache:
    """An engine over a memory that a test can look into."""

    def __init__(self, memory: MemoryBackend) -> None:
        self.memory = memory
        self.codec = Zip()
        self.now = 0.0
        self.engine = CacheEngine(
            memory, LRU(), location="Fake", lease_ttl_s=100, clock=lambda: self.now,
            loaders=ThreadPoolExecutor(2),
        )  # fmt: skip

    def store(self, tokens: Sequence[int], world: int = 1, form: RankLayout | None = FORM) -> None:
        packed = pack_tokens(tokens)
        for rank in range(world):
            items = [
                StoreItem(
                    link.parent, packed[link.start * 4 : link.end * 4],
                    25 * (link.end - link.start), link.start,
                )
                for link in chain(SPACE, packed, CHUNK)
            ]  # fmt: skip
            grants = self.engine.allocate(SPACE, rank, world, CHUNK, items, "worker", form)
            written = []
            for item, grant in zip(items, grants, strict=True):
                if grant.status == "granted":
                    payload = payload_of(item, rank)
                    self.memory.view(Region(grant.offset, item.nbytes))[:] = payload
                    written.append((grant.ticket, xxh3_64_intdigest(payload)))
            assert self.engine.commit(written, "worker") == len(written)

    def encode(self, tokens: Sequence[int]) -> list[Transcoded]:
        return [self.engine.encode(key, "zip", self.codec) for key in keys_of(tokens)]

    def decode(self, tokens: Sequence[int]) -> list[Transcoded]:
        return [self.engine.decode(key, "zip") for key in keys_of(tokens)]

    def find(self, tokens: Sequence[int], world: int = 1, wait_s: float = 20) -> Match:
        return self.engine.lookup(SPACE, pack_tokens(tokens), CHUNK, world, "reader", wait_s)

    def hit(self, tokens: Sequence[int], wait_s: float = 20) -> int:
        """How many tokens are found, and intact; holds nothing."""
        match = self.find(tokens, wait_s=wait_s)
        for chunk in match.chunks:
            self.check(chunk)
        self.engine.release(match.lease, None)
        return match.chunks[-1].end if match.chunks else 0

    def check(self, chunk: Located) -> None:
        """The payload is there, as it was stored."""
        for rank, extent in enumerate(chunk.extents):
            data = bytes(self.memory.view(Region(extent.offset, extent.nbytes)))
            assert xxh3_64_intdigest(data) == extent.checksum
            assert data == bytes([rank + 1]) * extent.nbytes

    def stat(self, name: str) -> float:
        return self.engine.stats()[name]


def payload_of(item: StoreItem, rank: int) -> bytes:
    return bytes([rank + 1]) * item.nbytes


def keys_of(tokens: Sequence[int]) -> list[ChunkKey]:
    return [link.key for link in chain(SPACE, pack_tokens(tokens), CHUNK)]


@pytest.fixture
def make_cache(fake_memory: Callable[[int], MemoryBackend]) -> Iterator[Callable[..., Cache]]:
    made: list[Cache] = []

    def make(capacity_bytes: int = 1000) -> Cache:
        made.append(Cache(fake_memory(capacity_bytes)))
        return made[-1]

    yield make
    for cache in made:
        cache.codec.gate.set()
        cache.engine.close()


@pytest.fixture
def cache(make_cache: Callable[..., Cache]) -> Cache:
    return make_cache()


MakeCache = Callable[..., Cache]


def test_encoding_frees_memory_and_says_how_much(cache: Cache) -> None:
    cache.store(range(8))
    results = cache.encode(range(8))
    assert [(each.status, each.bytes_before) for each in results] == [("done", 100)] * 2
    assert cache.stat("allocated_bytes") == sum(each.bytes_after for each in results) < 100
    assert cache.stat("encoded_chunks_total") == 2


def test_an_encoded_chunk_is_found_and_reads_as_it_was_stored(cache: Cache) -> None:
    cache.store(range(10))
    cache.encode(range(10))
    assert cache.hit(range(10)) == 10
    assert cache.hit(range(7)) == 7


def test_a_codec_learns_what_the_payload_is(cache: Cache) -> None:
    cache.store(range(6))
    cache.encode(range(6))
    assert cache.codec.encoded == [
        ChunkInfo(FORM.layout, 4, 0, FORM.rope, 3),
        ChunkInfo(FORM.layout, 2, 4, FORM.rope, 3),
    ]


def test_all_ranks_of_a_chunk_are_encoded_and_decoded(cache: Cache) -> None:
    cache.store(range(8), world=3)
    assert [each.bytes_before for each in cache.encode(range(8))] == [300, 300]
    match = cache.find(range(8), world=3)
    assert [len(chunk.extents) for chunk in match.chunks] == [3, 3]
    for chunk in match.chunks:
        cache.check(chunk)
    assert [each.status for each in cache.decode(range(8))] == ["done", "done"]


def test_the_decoded_copy_goes_with_its_lease(cache: Cache) -> None:
    cache.store(range(8))
    cache.encode(range(8))
    before = cache.stat("allocated_bytes")
    match = cache.find(range(8))
    assert cache.stat("allocated_bytes") == before + 200
    cache.engine.release(match.lease, 0)
    assert cache.stat("allocated_bytes") == before


def test_two_readers_share_a_decoded_copy(cache: Cache) -> None:
    cache.store(range(8))
    cache.encode(range(8))
    first, second = cache.find(range(8)), cache.find(range(8))
    assert [c.extents for c in first.chunks] == [c.extents for c in second.chunks]
    assert cache.stat("decoded_chunks_total") == 2
    cache.engine.release(first.lease, None)
    for chunk in second.chunks:
        cache.check(chunk)
    cache.engine.release(second.lease, None)


def test_encoding_twice_is_fine_and_says_so(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    assert cache.encode(range(4)) == [Transcoded("already")]
    assert cache.stat("encoded_chunks_total") == 1


def test_a_chunk_that_is_encoded_otherwise_is_left_so(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    [key] = keys_of(range(4))
    why = "it is encoded with zip"
    assert cache.engine.encode(key, "other", cache.codec) == Transcoded("failed", why)
    assert cache.engine.decode(key, "other") == Transcoded("failed", why)


def test_decoding_for_good_is_the_reverse(cache: Cache) -> None:
    cache.store(range(8))
    cache.encode(range(8))
    results = cache.decode(range(8))
    assert [(each.status, each.bytes_after) for each in results] == [("done", 100)] * 2
    assert cache.stat("allocated_bytes") == 200
    assert cache.hit(range(8), wait_s=0) == 8
    assert cache.decode(range(8)) == [Transcoded("already")] * 2


def test_decoding_for_good_keeps_a_copy_that_readers_have(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    match = cache.find(range(4))
    cache.decode(range(4))
    assert cache.stat("decoded_chunks_total") == 1
    assert cache.find(range(4), wait_s=0).chunks[0].extents == match.chunks[0].extents
    cache.engine.release(match.lease, None)
    assert cache.hit(range(4)) == 4


def test_listeners_do_not_hear_of_encoding(cache: Cache) -> None:
    heard: list[object] = []

    class Listener:
        def added(self, chunk: StoredChunk) -> None:
            heard.append(chunk)

        def removed(self, key: ChunkKey) -> None:
            heard.append(key)

    cache.store(range(8))
    cache.engine.subscribe(Listener())
    cache.encode(range(8))
    cache.decode(range(8))
    assert heard == []


# Readers, while chunks change.


def test_a_reader_keeps_the_raw_bytes_until_it_is_done(cache: Cache) -> None:
    cache.store(range(4))
    match = cache.find(range(4))
    [result] = cache.encode(range(4))
    assert result.status == "done"
    cache.check(match.chunks[0])
    assert cache.stat("allocated_bytes") == 100 + result.bytes_after
    cache.engine.release(match.lease, None)
    assert cache.stat("allocated_bytes") == result.bytes_after


def test_the_raw_bytes_serve_until_the_encoded_ones_are_verified(cache: Cache) -> None:
    cache.store(range(4))
    cache.codec.gate.clear()
    packing = Thread(target=cache.encode, args=(range(4),))
    packing.start()
    assert cache.codec.begun.acquire(timeout=20)
    assert cache.hit(range(4), wait_s=0) == 4
    assert cache.stat("allocated_bytes") == 100
    cache.codec.gate.set()
    packing.join()
    assert cache.stat("allocated_bytes") < 100


def test_only_one_operation_at_a_time_is_at_work_on_a_chunk(cache: Cache) -> None:
    cache.store(range(4))
    cache.codec.gate.clear()
    packing = Thread(target=cache.encode, args=(range(4),))
    packing.start()
    assert cache.codec.begun.acquire(timeout=20)
    assert cache.encode(range(4)) == [Transcoded("failed", "another operation is at work on it")]
    cache.codec.gate.set()
    packing.join()


@pytest.mark.parametrize("end", ["cleared", "corrupt"])
def test_a_chunk_that_goes_while_it_is_encoded_is_gone(cache: Cache, end: str) -> None:
    cache.store(range(4))
    cache.codec.gate.clear()
    results: list[Transcoded] = []
    packing = Thread(target=lambda: results.extend(cache.encode(range(4))))
    packing.start()
    assert cache.codec.begun.acquire(timeout=20)
    if end == "cleared":
        cache.engine.clear()
    else:
        cache.engine.drop_corrupt(keys_of(range(4))[0])
    cache.codec.gate.set()
    packing.join()
    assert results == [Transcoded("gone")]
    assert cache.stat("allocated_bytes") == 0


def test_a_chunk_that_is_being_encoded_is_not_evicted(make_cache: MakeCache) -> None:
    cache = make_cache(200)
    cache.store(range(4))
    cache.codec.gate.clear()
    packing = Thread(target=cache.encode, args=(range(4),))
    packing.start()
    assert cache.codec.begun.acquire(timeout=20)
    item = StoreItem(SPACE[:16], pack_tokens([9]), 101)
    assert cache.engine.allocate(SPACE, 0, 1, CHUNK, [item], "w")[0].status == "refused"
    cache.codec.gate.set()
    packing.join()


# Late, or no room.


def test_what_is_not_decoded_in_time_ends_the_prefix(cache: Cache) -> None:
    cache.store(range(12))
    [_, second, _] = keys_of(range(12))
    cache.engine.encode(second, "zip", cache.codec)
    cache.codec.gate.clear()
    match = cache.find(range(12), wait_s=0)
    assert [chunk.end for chunk in match.chunks] == [4]
    assert cache.stat("decode_late_total") == 1
    assert cache.stat("hit_tokens_total") == 4
    cache.codec.gate.set()
    cache.engine.release(match.lease, None)
    cache.engine.close()
    assert cache.memory.usage().allocated_bytes == 0


def test_a_first_chunk_that_is_late_makes_a_miss_that_holds_nothing(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    cache.codec.gate.clear()
    assert cache.find(range(4), wait_s=0) == Match(0, ())
    assert cache.stat("leases") == 0


def test_nobody_decodes_what_nobody_waits_for(cache: Cache) -> None:
    cache.store(range(40))
    cache.encode(range(40))
    cache.codec.gate.clear()
    before = cache.codec.decoded
    cache.find(range(40), wait_s=0)
    cache.codec.gate.set()
    assert cache.hit(range(4)) == 4
    assert cache.codec.decoded - before <= 4  # two at most had begun


def test_a_chunk_that_goes_while_a_lookup_waits_for_another_leaves_no_memory_behind(
    cache: Cache,
) -> None:
    cache.store(range(8))
    cache.engine.encode(keys_of(range(4))[0], "zip", cache.codec)
    cache.codec.gate.clear()
    search = cache.engine.begin_lookup(SPACE, pack_tokens(range(8)), CHUNK, 1, "r", Event().set)
    cache.engine.clear()
    assert cache.engine.finish_lookup(search) == Match(0, ())
    cache.codec.gate.set()
    cache.engine._loaders.shutdown()
    assert cache.memory.usage().allocated_bytes == 0


def test_one_who_comes_while_others_wait_gets_the_same_copy(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    while cache.codec.begun.acquire(blocking=False):
        pass
    cache.codec.gate.clear()
    hits: list[int] = []
    readers = [Thread(target=lambda: hits.append(cache.hit(range(4)))) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert cache.codec.begun.acquire(timeout=20)
    cache.codec.gate.set()
    for reader in readers:
        reader.join()
    assert hits == [4, 4, 4]


def test_an_owner_that_dies_while_it_waits_gets_nothing_and_holds_nothing(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    before = cache.stat("allocated_bytes")
    while cache.codec.begun.acquire(blocking=False):
        pass
    cache.codec.gate.clear()
    ended = Event()
    search = cache.engine.begin_lookup(SPACE, pack_tokens(range(4)), CHUNK, 1, "r", ended.set)
    assert cache.codec.begun.acquire(timeout=20)
    cache.engine.drop_owner("r")
    cache.codec.gate.set()
    assert ended.wait(20)
    assert cache.engine.finish_lookup(search) == Match(0, ())
    assert cache.stat("allocated_bytes") == before


def test_without_room_for_a_decoded_copy_the_prefix_ends(make_cache: MakeCache) -> None:
    cache = make_cache(200)
    cache.store([50, 51, 52, 53])
    cache.store(range(4))
    cache.encode(range(4))
    match = cache.find([50, 51, 52, 53])
    assert cache.hit(range(4)) == 0
    assert cache.stat("decode_no_room_total") == 1
    cache.engine.release(match.lease, None)
    assert cache.hit(range(4)) == 4


def test_others_leave_to_make_room_for_a_decoded_copy(make_cache: MakeCache) -> None:
    cache = make_cache(200)
    cache.store(range(4))
    cache.encode(range(4))
    cache.store([50, 51, 52, 53])
    assert cache.hit(range(4)) == 4
    assert cache.stat("evicted_chunks_total") == 1


def test_a_full_cache_can_be_encoded_without_losing_anything(make_cache: MakeCache) -> None:
    cache = make_cache(1000)
    cache.store(range(40))
    assert cache.stat("largest_free_bytes") == 0
    assert [each.status for each in cache.encode(range(40))] == ["done"] * 10
    assert cache.stat("evicted_chunks_total") == 0


def test_the_same_memory_holds_more_when_it_is_encoded(make_cache: MakeCache) -> None:
    cache = make_cache(300)
    for first in range(0, 48, 4):
        cache.store(range(first, first + 4))
        cache.encode(range(first, first + 4))
    assert cache.stat("chunks") == 12
    assert cache.stat("evicted_chunks_total") == 0


def test_pinned_bytes_shrink_and_never_grow_over_the_budget(make_cache: MakeCache) -> None:
    cache = make_cache(400)
    tokens = range(16)
    cache.store(tokens)
    cache.encode(tokens)
    there, pinned = cache.engine.pin([SPACE], pack_tokens(tokens), "p")
    assert there == pinned
    statuses = [each.status for each in cache.decode(tokens)]
    assert statuses.count("done") == 1
    assert cache.stat("pinned_bytes") <= cache.engine.pin_budget_bytes
    refused = [each for each in cache.decode(tokens) if each.status == "failed"]
    assert "it is pinned, and would not fit" in refused[0].why


# Faults.


def test_a_codec_that_cannot_hold_its_bound_leaves_the_chunk_raw(cache: Cache) -> None:
    cache.store(range(4))
    cache.codec.fail = ValueError("the error would be 3 times the bound")
    assert cache.encode(range(4)) == [Transcoded("failed", "the error would be 3 times the bound")]
    assert cache.hit(range(4), wait_s=0) == 4
    assert cache.stat("encode_failed_total") == 1


def test_a_codec_with_a_bug_leaves_the_chunk_raw(cache: Cache) -> None:
    cache.store(range(4))
    cache.codec.fail = RuntimeError("bug")
    assert cache.encode(range(4)) == [Transcoded("failed", "RuntimeError: bug")]
    cache.codec.fail = None
    assert [each.status for each in cache.encode(range(4))] == ["done"]


def test_what_does_not_get_smaller_stays_raw(cache: Cache) -> None:
    cache.store([1])
    [first] = keys_of([1])
    cache.codec.encode = lambda payload, chunk: bytes(25)  # type: ignore[method-assign]
    assert cache.engine.encode(first, "zip", cache.codec) == Transcoded(
        "failed", "it would not get smaller"
    )


def test_chunks_of_ranks_that_do_not_say_what_they_store_stay_raw(cache: Cache) -> None:
    cache.store(range(4), form=None)
    assert cache.encode(range(4)) == [
        Transcoded("failed", "rank 0 has not said what its payloads are")
    ]


def test_payloads_of_an_unknown_type_stay_raw(cache: Cache) -> None:
    cache.store(range(4), form=RankLayout(KVLayout("int3", 25, 1, 1, "mla")))
    assert cache.encode(range(4)) == [
        Transcoded("failed", "rank 0 stores 'int3', which is not known")
    ]


def test_payloads_that_do_not_fit_their_layout_stay_raw(cache: Cache) -> None:
    cache.store(range(4), form=RankLayout(KVLayout("bfloat16", 1, 1, 8)))
    why = "rank 0 stored 100 bytes, and 128 are 4 tokens of its layout"
    assert cache.encode(range(4)) == [Transcoded("failed", why)]


def test_a_raw_chunk_that_is_corrupt_is_dropped_instead_of_encoded(cache: Cache) -> None:
    cache.store(range(4))
    cache.memory.view(Region(7, 1))[:] = b"\xff"
    why = "the bytes do not match their checksum"
    assert cache.encode(range(4)) == [Transcoded("failed", why)]
    assert cache.hit(range(4)) == 0
    assert cache.stat("corrupt_total") == 1
    assert cache.stat("allocated_bytes") == 0


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_an_encoded_chunk_is_a_miss_and_drops_it(cache: Cache, bit: int) -> None:
    cache.store(range(8))
    cache.encode(range(8))
    _, second = sorted(cache.memory._regions)  # type: ignore[attr-defined]
    cache.memory.view(second)[bit] ^= 1 << bit
    assert cache.hit(range(8)) == 4
    assert cache.stat("corrupt_total") == 1
    assert cache.stat("chunks") == 1
    assert cache.hit(range(8)) == 4


def test_a_codec_with_a_bug_is_a_miss_for_the_reader_and_no_loss(cache: Cache) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    cache.codec.fail = RuntimeError("bug")
    assert cache.hit(range(4)) == 0
    cache.codec.fail = None
    assert cache.hit(range(4)) == 4


def test_a_chunk_that_is_not_there_is_gone(cache: Cache) -> None:
    assert cache.encode(range(4)) == [Transcoded("gone")]
    assert cache.decode(range(4)) == [Transcoded("gone")]


def test_a_reader_who_comes_while_a_chunk_is_decoded_for_good_shares_the_copy(
    cache: Cache,
) -> None:
    cache.store(range(4))
    cache.encode(range(4))
    while cache.codec.begun.acquire(blocking=False):
        pass
    cache.codec.gate.clear()
    unpacking = Thread(target=cache.decode, args=(range(4),))
    unpacking.start()
    assert cache.codec.begun.acquire(timeout=20)
    reader = Thread(target=cache.hit, args=(range(4),))
    reader.start()
    cache.codec.gate.set()
    unpacking.join()
    reader.join()
    assert cache.stat("decoded_chunks_total") == 1
    assert cache.stat("allocated_bytes") == 100
    assert cache.hit(range(4), wait_s=0) == 4


def test_one_who_comes_after_it_was_given_up_has_it_decoded_anew(cache: Cache) -> None:
    cache.store(range(20))
    cache.encode(range(20))
    for _ in range(200):
        cache.find(range(20), wait_s=0)
        assert cache.hit(range(20)) == 20
