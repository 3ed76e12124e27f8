"""Wait for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 60.0
"""Bounds hangs: far longer than anything takes on a slow machine."""
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05

T = TypeVar("T")


def eventually(holds: Callable[[], T], what: str = "", *, timeout_s: float = DEADLINE_S) -> T:
    """Call ``holds`` until its result is true, and return that result.

    A ConnectionError counts as false: the program that is asked may not be up yet. ``what`` names
    the condition in the failure.
    """
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_PAUSE_S
    while True:
        last: ConnectionError | None = None
        try:
            if result := holds():
                return result
        except ConnectionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or holds}") from last
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
