"""Who waits until the controller's index holds what was noted.

No sockets. :meth:`SyncBarrier.ask` may be called from any thread and so may
:meth:`Barrier.until`; all else belongs to the agent's thread. The other end is
:meth:`lmcache_kit.controller.replica.Replica.confirm`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

AGAIN_S = 0.25


class Barrier:
    """For the index to hold what was noted before this was made. ``seq`` is the number that the
    last of it got, None until it has one."""

    def __init__(self, drop: Callable[[Barrier], None]) -> None:
        self.seq: int | None = None
        self.confirmed = False
        self._over = threading.Event()
        self._drop = drop

    def until(self, timeout_s: float) -> bool:
        """Whether it does; False after ``timeout_s`` seconds, or when nobody will tell."""
        try:
            self._over.wait(timeout_s)
        finally:
            self._drop(self)
        return self.confirmed

    def end(self, *, confirmed: bool) -> None:
        """Let go of who waits."""
        self.confirmed = confirmed
        self._over.set()


class SyncBarrier:
    """All who wait. A question is said again until it is answered or nobody waits any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: list[Barrier] = []
        self._closed = False
        self._next = 0.0

    def ask(self) -> Barrier:
        """Of all that was noted up to now."""
        wait = Barrier(self._forget)
        with self._lock:
            closed = self._closed
            if not closed:
                self._waits.append(wait)
        if closed:
            wait.end(confirmed=False)
        return wait

    def fresh(self) -> list[Barrier]:
        """Those without a number: what was noted before them must get one now."""
        with self._lock:
            return [wait for wait in self._waits if wait.seq is None]

    def number(self, waits: Sequence[Barrier], seq: int) -> None:
        """All that was noted before these is in ``seq``; ask at once."""
        for wait in waits:
            wait.seq = seq
        if waits:
            self._next = 0.0

    @property
    def wanted(self) -> int | None:
        """The number to ask about; None: nobody waits for one."""
        with self._lock:
            return max((wait.seq for wait in self._waits if wait.seq is not None), default=None)

    def due(self) -> float:
        """When to ask, on the clock."""
        return self._next

    def said(self, now: float) -> None:
        """It was asked."""
        self._next = now + AGAIN_S

    def restart(self) -> None:
        """A new connection: ask at once."""
        self._next = 0.0

    def answered(self, seq: int) -> None:
        """The index holds everything up to ``seq``."""
        with self._lock:
            held = [wait for wait in self._waits if wait.seq is not None and wait.seq <= seq]
            self._waits = [wait for wait in self._waits if wait not in held]
        for wait in held:
            wait.end(confirmed=True)

    def close(self) -> None:
        """Nobody will tell any more."""
        with self._lock:
            self._closed = True
            waits, self._waits = self._waits, []
        for wait in waits:
            wait.end(confirmed=False)

    def _forget(self, wait: Barrier) -> None:
        with self._lock:
            if wait in self._waits:
                self._waits.remove(wait)
