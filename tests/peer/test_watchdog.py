"""One thread ends whatever hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lmcache_kit.peer.watchdog import Watchdog

WAIT_S = 20.0


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog("test-watchdog")
    yield watchdog
    watchdog.close()


def test_what_is_overdue_is_called_and_what_is_not_is_left(watchdog: Watchdog) -> None:
    called, left = threading.Event(), threading.Event()
    watchdog.watch("later", 1000, left.set)
    watchdog.watch("soon", 0, called.set)
    assert called.wait(WAIT_S)
    assert not left.is_set()


def test_an_earlier_end_counts_and_a_later_one_does_not(watchdog: Watchdog) -> None:
    first, second, third = threading.Event(), threading.Event(), threading.Event()
    watchdog.watch("move", 1000, first.set)
    watchdog.watch("move", 0.05, second.set)
    watchdog.watch("move", 500, third.set)
    assert second.wait(WAIT_S)
    assert not first.is_set()
    assert not third.is_set()


def test_what_is_dropped_is_not_called(watchdog: Watchdog) -> None:
    dropped, called = threading.Event(), threading.Event()
    watchdog.watch("dropped", 0.1, dropped.set)
    watchdog.drop("dropped")
    watchdog.watch("called", 0.2, called.set)
    assert called.wait(WAIT_S)
    assert not dropped.is_set()


def test_moves_share_one_thread_which_ends_with_the_watchdog() -> None:
    watchdog = Watchdog("test-watchdog-of-many")
    for number in range(20):
        watchdog.watch(number, 1000, lambda: None)
    [thread] = [each for each in threading.enumerate() if each.name == "test-watchdog-of-many"]
    watchdog.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    watchdog.watch("after", 0, lambda: None)
