"""Tests of the end of a backend: close, kill, restart."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing import get_context

import pytest

from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import Backend
from lmcache_kit.testing._backend_tests import (
    BackendTests,
    MakeBackend,
    bytes_of,
    key_of,
    plain,
    put,
)


def do_and_be_killed(work: Callable[[], None], timeout_s: float) -> None:
    """Run ``work`` in a fork that is killed right after it, so that nothing is closed.

    Fails when ``work`` raises or does not end in time.
    """

    def life() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    process = get_context("fork").Process(target=life)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the fork uses no other thread
        process.start()
    process.join(timeout_s)
    in_time = not process.is_alive()
    process.kill()
    process.join()
    if not in_time:
        pytest.fail(f"a fork of this process has not ended after {timeout_s:g} s")
    if process.exitcode != -signal.SIGKILL:
        pytest.fail("a fork of this process failed; its traceback is in the output")


class EndingTests(BackendTests):
    """Part of :class:`~lmcache_kit.testing.BackendSuite`: close, kill and restart."""

    def test_all_is_there_when_it_is_opened_again(self, opened: MakeBackend) -> None:
        self.needs_persistence()
        first = opened()
        wanted = dict[bytes, tuple[bytes, bytes]]()
        for number in range(30):
            meta, data = bytes_of(number, 1), bytes_of(1000 * number, number)
            put(first, key_of(number), data, meta)
            wanted[key_of(number)] = (meta, data)
        put(first, key_of(3), b"again", b"other")
        wanted[key_of(3)] = (b"other", b"again")
        first.remove([key_of(4)])
        del wanted[key_of(4)]
        first.close()
        second = opened()
        assert {key: plain(second.get(key)) for key in wanted} == wanted
        assert second.get(key_of(4)) is None
        reported = {stored.key: (stored.meta, stored.nbytes) for stored in second.scan()}
        assert reported == {key: (meta, len(data)) for key, (meta, data) in wanted.items()}
        assert second.usage().entries == len(wanted)

    def test_what_was_put_is_there_after_a_kill(self, opened: MakeBackend) -> None:
        """Every blob whose ``put`` has returned, although nothing was closed."""
        self.needs_persistence()

        def put_some() -> None:
            backend = opened()
            for number in range(20):
                put(backend, key_of(number), bytes_of(1000 * number, number))
            put(backend, key_of(3), b"again", b"other")

        do_and_be_killed(put_some, 6 * self.timeout_s)
        again = opened()
        for number in range(20):
            wanted = (b"meta", bytes_of(1000 * number, number))
            found = plain(again.get(key_of(number)))
            assert found == ((b"other", b"again") if number == 3 else wanted)
        assert {stored.key for stored in again.scan()} == {key_of(number) for number in range(20)}
        assert again.usage().entries == 20

    def test_those_that_were_put_first_are_told_first_after_a_restart(
        self, opened: MakeBackend
    ) -> None:
        """The order may be unknown; a backend that knows it before a restart knows it after."""
        self.needs_persistence()
        first = opened()
        for number in range(20):
            put(first, key_of(number), b"data")
        before = [stored.key for stored in first.scan()]
        first.close()
        if before == [key_of(number) for number in range(20)]:
            after = [stored.key for stored in opened().scan()]
            assert after == before, "it knew the order before it was closed"

    def test_room_is_counted_after_a_restart(self, opened: MakeBackend) -> None:
        self.needs_persistence()
        first = opened()
        for number in range(5):
            put(first, key_of(number), bytes_of(100_000))
        before = first.usage()
        first.close()
        assert opened().usage() == before

    def test_a_blob_that_was_got_outlives_the_backend(self, backend: Backend) -> None:
        put(backend, key_of(1), bytes_of(2_000_000))
        blob = backend.get(key_of(1))
        self.within(backend.close, what="close()")
        assert plain(blob) == (b"meta", bytes_of(2_000_000))

    def test_closing_twice_is_fine(self, backend: Backend) -> None:
        for _ in range(3):
            self.within(backend.close, what="close()")

    def test_whatever_is_asked_of_a_closed_one_is_a_backend_error(self, backend: Backend) -> None:
        put(backend, key_of(1), b"data")
        backend.close()
        calls = {
            "put": lambda: backend.put(key_of(2), b"meta", [memoryview(b"data")]),
            "get": lambda: backend.get(key_of(1)),
            "contains": lambda: backend.contains([key_of(1)]),
            "remove": lambda: backend.remove([key_of(1)]),
            "scan": lambda: list(backend.scan()),
            "usage": backend.usage,
        }
        answered = []
        for name, call in calls.items():
            try:
                self.within(call, what=f"{name}() of a closed backend")
                answered.append(name)
            except BackendError:
                pass
        assert answered == [], "these methods do not raise BackendError after close()"

    def test_closing_while_threads_are_at_work_ends_them_all(self, backend: Backend) -> None:
        begun, stop = threading.Barrier(5), threading.Event()
        ends: list[BaseException] = []

        def work(thread: int) -> None:
            begun.wait(self.timeout_s)
            try:
                for step in itertools.count():
                    if stop.is_set():
                        return
                    key = key_of(10 * thread + step % 10)
                    backend.put(key, b"meta", [memoryview(bytes(50_000))])
                    assert plain(backend.get(key)) in (None, (b"meta", bytes(50_000)))
                    list(backend.scan())
            except BaseException as error:  # noqa: BLE001 - checked below
                ends.append(error)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        begun.wait(self.timeout_s)
        self.within(backend.close, what="close() while four threads are at work")
        for thread in threads:
            thread.join(self.timeout_s / len(threads))
        stop.set()
        assert len(ends) == 4, f"{4 - len(ends)} of four threads still run after close()"
        assert [type(end) for end in ends if not isinstance(end, BackendError)] == []

    def test_closing_gives_everything_back(self, make_backend: MakeBackend) -> None:
        def life(number: int) -> None:
            backend = make_backend()
            put(backend, key_of(number), bytes_of(100_000))
            backend.get(key_of(number))
            backend.contains([key_of(number)])
            list(backend.scan())
            backend.close()

        def held() -> tuple[int, int]:
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        life(0)
        before = held()
        for number in range(1, 5):
            life(number)
        if held() != before:
            gc.collect()
        after = held()
        assert after[0] <= before[0], f"open descriptors grew from {before[0]} to {after[0]}"
        assert after[1] <= before[1], f"threads grew from {before[1]} to {after[1]}"
