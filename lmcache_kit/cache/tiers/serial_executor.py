"""A serial executor: one thread that carries changes out in order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from lmcache_kit.errors import BackendError

logger = logging.getLogger(__name__)

MAX_WAITING = 1 << 16
_T = TypeVar("_T")


class SerialExecutor:
    """Changes of the store called ``name``, one after the other.

    ``waiting``: how many changes are enqueued and have not begun. ``passed_over``: how many were
    refused, because too many waited.
    """

    def __init__(self, name: str) -> None:
        self.waiting = 0
        self.passed_over = 0
        self._name = name
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmcache-kit-tier")

    def enqueue(self, change: Callable[[], object]) -> None:
        """Call ``change`` in its turn. A BackendError that it raises is dropped, any other error is
        logged."""
        with self._lock:
            if self.waiting >= MAX_WAITING:
                self.passed_over += 1
                return
            self.waiting += 1

        def run() -> None:
            with self._lock:
                self.waiting -= 1
            try:
                change()
            except BackendError:
                pass
            except Exception:
                # The thread's boundary: nobody asks for the result, so that a defect would be lost.
                logger.exception("%s: a change of the store failed", self._name)

        self._submit(run)

    def call(self, change: Callable[[], _T]) -> _T:
        """Return what ``change`` returns, in its turn.

        Raises what it raises, and BackendError when the executor is closed.
        """
        turn = self._submit(change)
        if turn is None:
            raise BackendError(f"{self._name} is closed")
        return turn.result()

    def flush(self, timeout_s: float) -> bool:
        """Wait for all enqueued changes. False if ``timeout_s`` seconds are not enough."""
        turn = self._submit(lambda: None)
        with suppress(TimeoutError):
            if turn is not None:
                turn.result(timeout_s)
            return True
        return False

    def cancel(self) -> None:
        """Refuse and drop all changes but the one at work."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for the change at work."""
        self._thread.shutdown()

    def _submit(self, change: Callable[[], _T]) -> Future[_T] | None:
        with suppress(RuntimeError):
            return self._thread.submit(change)
        return None
