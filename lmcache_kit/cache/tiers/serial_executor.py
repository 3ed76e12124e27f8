"""One thread that does things in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from lmcache_kit.errors import BackendError

MAX_WAITING = 1 << 16
_T = TypeVar("_T")


class SerialExecutor:
    """Changes to the store called ``name``, one after the other. ``waiting``: how many were sent
    and have not begun; ``passed_over``: how many were not taken, because too many waited."""

    def __init__(self, name: str) -> None:
        self.waiting = 0
        self.passed_over = 0
        self._name = name
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmcache-kit-tier")

    def enqueue(self, change: Callable[[], object]) -> None:
        """Have ``change`` called in its turn; nobody hears of the BackendError that it raises."""
        with self._lock:
            if self.waiting >= MAX_WAITING:
                self.passed_over += 1
                return
            self.waiting += 1

        def run() -> None:
            with self._lock:
                self.waiting -= 1
            with suppress(BackendError):
                change()

        self._submit(run)

    def call(self, change: Callable[[], _T]) -> _T:
        """What ``change`` returns in its turn. Raises what it raises, and BackendError when this
        is closed."""
        turn = self._submit(change)
        if turn is None:
            raise BackendError(f"{self._name} is closed")
        return turn.result()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was sent is done; False if it is not within ``timeout_s`` seconds."""
        turn = self._submit(lambda: None)
        with suppress(TimeoutError):
            if turn is not None:
                turn.result(timeout_s)
            return True
        return False

    def cancel(self) -> None:
        """Take nothing more, and forget what waits; what is at work goes on."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for what is at work."""
        self._thread.shutdown()

    def _submit(self, change: Callable[[], _T]) -> Future[_T] | None:
        with suppress(RuntimeError):
            return self._thread.submit(change)
        return None
