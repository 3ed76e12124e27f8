"""Wake a thread that waits in a poll or a selector."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref


class WakeupFd:
    """A file descriptor that becomes readable when any thread calls :meth:`wake`.

    It stays readable until the polling thread calls :meth:`clear`, which it does before it looks
    at what it was woken for. Of several calls of :meth:`wake` between two of :meth:`clear` only
    the first costs a system call.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._woken = False
        self._closed = False
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self._close_fd.atexit = False

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._fd

    def wake(self) -> None:
        """Wake the polling thread. Safe from any thread; without effect after :meth:`close`."""
        if not self._woken:
            self._woken = True
            with self._lock:
                if not self._closed:
                    os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Let the next :meth:`wake` wake again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._woken = False

    def close(self) -> None:
        """Close the descriptor. Safe to call twice."""
        with self._lock:
            self._close()

    def close_after_fork(self) -> None:
        """Close the copy of a forked child, where the lock's holder may not exist."""
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._close_fd()
