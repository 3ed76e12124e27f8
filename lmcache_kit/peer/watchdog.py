"""End moves that hang, on one thread for all of them: a thread for each would slow short moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from math import inf


class Watchdog:
    """Calls back what is overdue. The thread starts with the first entry."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._due: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self._wakes_at = -inf
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, owner: Hashable, seconds: float, call: Callable[[], None]) -> None:
        """Call ``call`` after ``seconds`` unless ``owner`` is dropped first. The earliest wins."""
        at = time.monotonic() + seconds
        with self._changed:
            if self._closed or at >= self._due.get(owner, (inf, call))[0]:
                return
            self._due[owner] = at, call
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif at < self._wakes_at:
                self._changed.notify()

    def drop(self, owner: Hashable) -> None:
        """Call nothing for ``owner`` any more."""
        with self._changed:
            self._due.pop(owner, None)

    def close(self) -> None:
        """Call nothing any more."""
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                overdue = [owner for owner, (at, _) in self._due.items() if at <= now]
                calls = [self._due.pop(owner)[1] for owner in overdue]
                if not calls:
                    self._wakes_at = min([at for at, _ in self._due.values()], default=inf)
                    self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))
                    self._wakes_at = -inf
            for call in calls:
                call()
