"""Clocks that tests move."""

from __future__ import annotations


class FakeClock:
    """A clock in seconds that stands still until a test changes ``now``."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
