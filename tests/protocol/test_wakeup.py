"""The descriptor that wakes a polling thread."""

from __future__ import annotations

import os
import select

import pytest

from lmcache_kit.protocol.wakeup import WakeupFd


def is_readable(wakeup: WakeupFd) -> bool:
    return bool(select.select([wakeup], [], [], 0)[0])


def test_it_is_readable_from_a_wake_until_it_is_cleared() -> None:
    wakeup = WakeupFd()
    assert not is_readable(wakeup)
    wakeup.wake()
    wakeup.wake()
    assert is_readable(wakeup)
    wakeup.clear()
    assert not is_readable(wakeup)
    wakeup.wake()
    assert is_readable(wakeup)
    wakeup.close()


def test_a_wake_after_the_close_writes_to_no_other_descriptor() -> None:
    wakeup = WakeupFd()
    wakeup.close()
    wakeup.close()
    reading, writing = os.pipe()
    try:
        wakeup.wake()
        assert not select.select([reading], [], [], 0)[0]
    finally:
        os.close(reading)
        os.close(writing)


def test_a_dropped_one_leaves_no_descriptor_open() -> None:
    wakeup = WakeupFd()
    number = wakeup.fileno()
    del wakeup
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
