"""Tests of a backend with several threads at once."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from lmcache_kit.interfaces import Backend
from lmcache_kit.testing._backend_tests import (
    BackendTests,
    MakeBackend,
    bytes_of,
    key_of,
    plain,
    put,
)
from lmcache_kit.testing._bytes import Bytes

_THREADS = 4
_STEPS = 60
_T = TypeVar("_T")


def together(work: Callable[[int], _T], threads: int = _THREADS) -> list[_T]:
    """Run ``work`` in all threads at once; return its results, or raise its exception."""
    begin = threading.Barrier(threads)

    def run(number: int) -> _T:
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


class ThreadTests(BackendTests):
    """Part of :class:`~lmcache_kit.testing.BackendSuite`: several threads at once."""

    def test_threads_with_keys_of_their_own_lose_nothing(self, backend: Backend) -> None:
        """Each thread compares reads with its own puts; all are compared again at the end."""

        def work(thread: int) -> dict[bytes, bytes]:
            dice, mine = random.Random(thread), dict[bytes, bytes]()
            for step in range(_STEPS):
                key = key_of(1000 * thread + dice.randrange(8))
                action = dice.choice(["put", "put", "get", "remove"])
                if action == "put":
                    data = bytes_of(dice.randrange(30_000), 1000 * thread + step)
                    put(backend, key, data)
                    mine[key] = data
                elif action == "remove":
                    backend.remove([key])
                    mine.pop(key, None)
                wanted = (b"meta", mine[key]) if key in mine else None
                assert plain(backend.get(key)) == wanted
                assert backend.contains([key]) == [key in mine]
            return mine

        left = self.within(lambda: together(work), what="threads", seconds=6 * self.timeout_s)
        wanted = {key: data for mine in left for key, data in mine.items()}
        assert {stored.key for stored in backend.scan()} == wanted.keys()
        assert {key: plain(backend.get(key)) for key in wanted} == {
            key: (b"meta", data) for key, data in wanted.items()
        }
        assert backend.usage().entries == len(wanted)

    def test_a_reader_gets_a_blob_whole_while_it_is_replaced(self, backend: Backend) -> None:
        """Meta and data of one put, never a mixture or a part."""
        versions = [
            (b"%d" % number, Bytes([number] * (20_000 + 5000 * number))) for number in range(8)
        ]
        put(backend, key_of(1), versions[0][1], versions[0][0])
        done = threading.Event()

        def work(thread: int) -> None:
            if thread == 0:
                try:
                    for step in range(_STEPS):
                        meta, data = versions[step % len(versions)]
                        put(backend, key_of(1), data, meta)
                finally:
                    done.set()
                return
            while not done.is_set():
                assert plain(backend.get(key_of(1))) in versions, "a torn or missing blob"

        self.within(lambda: together(work), what="readers and a writer", seconds=6 * self.timeout_s)

    def test_threads_with_the_same_keys_leave_whole_blobs(self, backend: Backend) -> None:
        """The last writer may be any thread; all methods agree on one complete blob."""
        keys = [key_of(number) for number in range(3)]
        versions = {
            b"%d" % number: Bytes([number] * (3000 * number)) for number in range(4 * _THREADS)
        }

        def check(meta: bytes, data: bytes) -> None:
            assert versions[meta] == data, "the meta of one put, and data of another"

        def work(thread: int) -> None:
            dice, mine = random.Random(thread), list(versions.items())[thread::_THREADS]
            for _ in range(_STEPS):
                key, (meta, data) = dice.choice(keys), dice.choice(mine)
                put(backend, key, data, meta)
                if found := plain(backend.get(key)):
                    check(*found)
                if dice.random() < 0.2:
                    backend.remove([key])

        self.within(lambda: together(work), what="threads", seconds=6 * self.timeout_s)
        there = {key: found for key in keys if (found := plain(backend.get(key)))}
        for found in there.values():
            check(*found)
        reported = {stored.key: (stored.meta, stored.nbytes) for stored in backend.scan()}
        assert reported == {key: (meta, len(data)) for key, (meta, data) in there.items()}
        assert backend.contains(keys) == [key in there for key in keys]
        assert backend.usage().entries == len(there)

    def test_a_blob_that_is_read_outlives_its_removal(self, backend: Backend) -> None:
        put(backend, key_of(1), bytes_of(2_000_000))
        blob = backend.get(key_of(1))
        backend.remove([key_of(1)])
        put(backend, key_of(2), bytes(2_000_000))
        put(backend, key_of(1), b"other")
        assert plain(blob) == (b"meta", bytes_of(2_000_000))

    def test_scan_goes_on_while_others_put_and_remove(self, backend: Backend) -> None:
        """Neither put() nor remove() waits for a scan that is read slowly."""
        staying = {key_of(number) for number in range(40)}
        for key in staying:
            put(backend, key, b"stays")
        changed, done = threading.Event(), threading.Event()

        def change(step: int) -> None:
            put(backend, key_of(1000 + step % 60), b"comes")
            backend.remove([key_of(1000 + (step + 30) % 60)])
            changed.set()

        def work(thread: int) -> None:
            if thread == 0:
                for step in itertools.count():
                    if done.is_set():
                        return
                    change(step)
            waiting = True
            try:
                for _ in range(5):
                    found = list[bytes]()
                    for stored in backend.scan():
                        found.append(stored.key)
                        if waiting and len(found) % 10 == 1:
                            changed.clear()
                            waiting = changed.wait(self.timeout_s)
                    assert len(found) == len(set(found)), "a blob came twice"
                    assert staying <= set(found), "a blob that was there all the time did not come"
            finally:
                done.set()
            assert waiting, "put() or remove() waits until a scan has been read to its end"

        self.within(lambda: together(work, 2), what="scans", seconds=6 * self.timeout_s)

    def test_room_is_kept_to_by_threads_together(self, backend: Backend) -> None:
        size = self.needs_bound() // 20

        def work(thread: int) -> None:
            for number in range(10):
                backend.put(key_of(100 * thread + number), b"meta", [memoryview(bytes(size))])
                usage = backend.usage()
                assert usage.capacity_bytes is not None
                assert usage.nbytes <= usage.capacity_bytes

        self.within(lambda: together(work), what="four threads", seconds=6 * self.timeout_s)
        kept = [stored.key for stored in backend.scan()]
        assert 10 <= len(kept) <= 20

    def test_two_that_share_a_store_see_what_each_other_does(
        self, backend: Backend, opened: MakeBackend
    ) -> None:
        if not backend.shared:
            pytest.skip("shared = False: one process uses the store at a time")
        other = opened()
        put(backend, key_of(1), b"of one")
        assert plain(other.get(key_of(1))) == (b"meta", b"of one")
        assert other.contains([key_of(1), key_of(2)]) == [True, False]
        put(other, key_of(1), b"of the other")
        assert plain(backend.get(key_of(1))) == (b"meta", b"of the other")
        other.remove([key_of(1)])
        self.is_empty(backend, [key_of(1)])
