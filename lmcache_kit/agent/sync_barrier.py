"""Barriers: wait until the controller's index holds everything up to now.

No sockets. :meth:`SyncBarrier.open` and :meth:`Barrier.wait` may be called from any thread; all
else belongs to the agent's thread. The other end is
:meth:`lmcache_kit.controller.replica.Replica.confirm`.

A barrier is pending until the changes before it have a sequence number. Then it waits for the
controller to confirm this number. The question is repeated until it is answered, or until no
barrier waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

ASK_AGAIN_S = 0.25


class Barrier:
    """Waits for the index to hold every change before it. ``seq`` is None while pending."""

    def __init__(self, drop: Callable[[Barrier], None]) -> None:
        self.seq: int | None = None
        self.confirmed = False
        self._completed = threading.Event()
        self._drop = drop

    def wait(self, timeout_s: float) -> bool:
        """Return whether the index holds it. False after ``timeout_s`` seconds or a close."""
        try:
            self._completed.wait(timeout_s)
        finally:
            self._drop(self)
        return self.confirmed

    def complete(self, *, confirmed: bool) -> None:
        """Release the waiting thread."""
        self.confirmed = confirmed
        self._completed.set()


class SyncBarrier:
    """The barriers of one location."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._barriers: list[Barrier] = []
        self._closed = False
        self._due = 0.0

    def open(self) -> Barrier:
        """Return a barrier for all changes up to now."""
        barrier = Barrier(self._drop)
        with self._lock:
            closed = self._closed
            if not closed:
                self._barriers.append(barrier)
        if closed:
            barrier.complete(confirmed=False)
        return barrier

    def pending(self) -> list[Barrier]:
        """Return the barriers whose changes need a sequence number."""
        with self._lock:
            return [barrier for barrier in self._barriers if barrier.seq is None]

    def assign(self, barriers: Sequence[Barrier], seq: int) -> None:
        """Give ``seq`` to barriers whose changes are all numbered, and ask at once."""
        for barrier in barriers:
            barrier.seq = seq
        if barriers:
            self._due = 0.0

    @property
    def wanted_seq(self) -> int | None:
        """The number to ask about; None when no barrier waits for one."""
        with self._lock:
            numbered = (barrier.seq for barrier in self._barriers if barrier.seq is not None)
            return max(numbered, default=None)

    @property
    def due(self) -> float:
        """When to ask, on the clock."""
        return self._due

    def mark_asked(self, now: float) -> None:
        """Ask again after a while."""
        self._due = now + ASK_AGAIN_S

    def restart(self) -> None:
        """Ask at once on a new connection."""
        self._due = 0.0

    def complete(self, seq: int) -> None:
        """Release the barriers up to ``seq``: the index holds everything before them."""
        with self._lock:
            held = [each for each in self._barriers if each.seq is not None and each.seq <= seq]
            self._barriers = [each for each in self._barriers if each not in held]
        for barrier in held:
            barrier.complete(confirmed=True)

    def close(self) -> None:
        """Release all barriers unconfirmed, now and later."""
        with self._lock:
            self._closed = True
            barriers, self._barriers = self._barriers, []
        for barrier in barriers:
            barrier.complete(confirmed=False)

    def _drop(self, barrier: Barrier) -> None:
        with self._lock:
            if barrier in self._barriers:
                self._barriers.remove(barrier)
