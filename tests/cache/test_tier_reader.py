"""Chunks of a tier come into memory several at a time, from stores that read and that open."""

from __future__ import annotations

import threading

import pytest

from lmcache_kit.cache.tiers.tier_reader import AHEAD
from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import Blob, OpenBlob
from tests.cache.stores import Cache, Dict, MakeCache, keys

MANY = range(4 * 3 * AHEAD)


class File:
    """Data that is given out in small pieces; it ``ends`` after so many, or breaks."""

    def __init__(self, data: bytes, store: Opening) -> None:
        self.rest = memoryview(data)
        self.store = store
        self.pieces = 0

    def readinto(self, buffer: memoryview, /) -> int | None:
        self.store.read_gate.wait(30)
        if self.store.breaks_after == self.pieces:
            raise OSError(5, "Input/output error")
        if self.store.ends_after == self.pieces:
            return 0
        self.pieces += 1
        count = min(30, len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return self.store.lies_about or count

    def close(self) -> None:
        self.store.opened.discard(self)


class Opening(Dict):
    """Opens what others read. ``opened``: what has not been closed."""

    breaks_after: int | None = None
    ends_after: int | None = None
    lies_about = 0

    def __init__(self) -> None:
        super().__init__()
        self.opened: set[File] = set()
        self.most_opened = 0
        self.read_gate = threading.Event()
        self.read_gate.set()

    def get(self, key: bytes) -> Blob | OpenBlob | None:
        blob = super().get(key)
        if not isinstance(blob, Blob):
            return blob
        file = File(bytes(blob.data), self)
        self.opened.add(file)
        self.most_opened = max(self.most_opened, len(self.opened))
        return OpenBlob(blob.meta, file)


def evicted(make: MakeCache, store: Dict, tokens: range = MANY, memory: int = 10_000) -> Cache:
    """A cache that has them in its store and nowhere else."""
    cache = make(store, memory=memory)
    cache.store(tokens)
    cache.forget_memory()
    return cache


def all_is_closed(cache: Cache, store: Opening) -> None:
    cache.close()  # waits for what is still on its way
    assert store.opened == set()


def test_what_is_opened_comes_back_and_is_closed(make: MakeCache) -> None:
    store = Opening()
    cache = evicted(make, store)
    assert cache.hit(MANY) == len(MANY)
    all_is_closed(cache, store)


def test_what_is_opened_can_be_encoded_where_it_lies(make: MakeCache) -> None:
    store = Opening()
    cache = evicted(make, store)
    found = cache.tiers[0].store.read(keys(MANY)[0])
    assert found is not None
    assert [len(piece) for piece in found[1]] == [100]
    all_is_closed(cache, store)


def test_several_are_on_their_way_at_once_but_not_all(make: MakeCache) -> None:
    store = Opening()
    cache = evicted(make, store)
    store.read_gate.clear()
    reading = threading.Thread(target=cache.hit, args=(MANY,))
    reading.start()
    for _ in range(5000):
        if store.most_opened >= 2:
            break
        threading.Event().wait(0.001)
    store.read_gate.set()
    reading.join()
    assert 2 <= store.most_opened <= 2 * AHEAD + 1
    assert cache.hit(MANY) == len(MANY)


@pytest.mark.parametrize("after", [0, 2])
def test_a_read_that_fails_is_a_miss_and_the_store_rests(make: MakeCache, after: int) -> None:
    store = Opening()
    cache = evicted(make, store)
    store.breaks_after = after
    assert cache.hit(MANY) == 0
    assert cache.stat("resting", "A") == 1
    assert cache.stat("chunks", "A") == len(keys(MANY)), "nothing is known to be wrong with them"
    assert cache.stat("pending") == cache.stat("allocated_bytes") == 0
    all_is_closed(cache, store)


@pytest.mark.parametrize("after", [0, 2])
def test_what_ends_too_early_is_a_miss_and_removed(make: MakeCache, after: int) -> None:
    store = Opening()
    cache = evicted(make, store)
    store.ends_after = after
    assert cache.hit(MANY) == 0
    cache.settle()
    assert keys(MANY)[0] not in store.blobs
    assert cache.stat("resting", "A") == 0
    all_is_closed(cache, store)


@pytest.mark.parametrize("count", [-1, 1_000_000])
def test_a_count_that_cannot_be_is_a_failure_of_the_store(make: MakeCache, count: int) -> None:
    store = Opening()
    cache = evicted(make, store)
    store.lies_about = count
    assert cache.hit(MANY) == 0
    assert cache.stat("resting", "A") == 1
    all_is_closed(cache, store)


@pytest.mark.parametrize("store", [Dict, Opening])
def test_what_follows_a_gap_does_not_come(make: MakeCache, store: type[Dict]) -> None:
    cache = evicted(make, store())
    del cache.stores[0].blobs[keys(MANY)[2]]
    assert cache.hit(MANY) == 8
    assert cache.stat("chunks") == 2
    assert cache.stat("allocated_bytes") == 200


@pytest.mark.parametrize("store", [Dict, Opening])
def test_the_first_ones_come_where_memory_has_no_room_for_all(
    make: MakeCache, store: type[Dict]
) -> None:
    cache = evicted(make, store(), memory=500)
    assert cache.hit(MANY) == 20


def test_a_slow_store_of_which_something_came_is_not_called_late(make: MakeCache) -> None:
    class Slow(Dict):
        """All but the first chunk waits for the gate."""

        def get(self, key: bytes) -> Blob | None:
            return Blob(*self.blobs[key]) if key == keys(MANY)[0] else super().get(key)

    cache = evicted(make, Slow())
    cache.stores[0].gate.clear()
    assert cache.hit(MANY, wait_s=0.5) == 4
    assert cache.stat("resting", "A") == 0


def test_a_lookup_that_gave_up_leaves_nothing_open(make: MakeCache) -> None:
    store = Opening()
    cache = evicted(make, store)
    store.read_gate.clear()
    assert cache.hit(MANY, wait_s=0.02) == 0
    store.read_gate.set()
    all_is_closed(cache, store)
    assert cache.stat("pending") == 0


def test_a_file_that_does_not_close_is_told_and_no_more(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: File) -> None:
        raise BackendError("closing failed")

    cache = evicted(make, Opening())
    monkeypatch.setattr(File, "close", fail)
    assert cache.hit(MANY) == len(MANY)
    assert "closing failed" in caplog.text
