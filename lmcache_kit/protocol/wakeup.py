"""Wake a thread that polls."""

from __future__ import annotations

import contextlib
import os
import threading


class WakeupFd:
    """Rung from any thread; heard by one that polls :attr:`fd`, until it has had a :meth:`rest`.
    Only the first ring after that costs a system call. Silent until it is hung up."""

    def __init__(self) -> None:
        self.fd = -1
        self._rung = False
        self._lock = threading.Lock()

    def hang_up(self) -> None:
        """From here on it is heard."""
        self.fd = os.eventfd(1 if self._rung else 0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        """Any thread."""
        if not self._rung:
            self._rung = True
            with self._lock:
                if self.fd >= 0:
                    os.eventfd_write(self.fd, 1)

    def rest(self) -> None:
        """Whatever comes after this rings again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._rung = False

    def take_down(self) -> None:
        """Nobody listens any more."""
        with self._lock:
            os.close(self.fd)
            self.fd = -1
