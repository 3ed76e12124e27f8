"""Relay warnings of a spawned cache process from its log file into the log of its client."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Format of the log file's lines, which :data:`_LINE` reads."""
POLL_S = 0.5
MAX_LINES = 20
WINDOW_S = 60.0
"""At most ``MAX_LINES`` lines are relayed in ``WINDOW_S`` seconds; the others are counted."""
_READ_BYTES = 1 << 18
_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (WARNING|ERROR|CRITICAL) [\w.]+: (.*)")
_FATAL = re.compile(rb"Fatal Python error: .*")

logger = logging.getLogger("lmcache_kit.cache_process")


class LogRelay:
    """Log again, in this process, what cache processes write to ``path`` as a warning or worse.

    Lines count from the making of the relay on, and go on with the next process that logs there. A
    file that is shorter than before has begun anew. ``position``: where the next read begins.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self.position = self._size()
        self._rest = b""
        self._window_began = clock()
        self._relayed = self._passed_over = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmcache-kit-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Relay what is written by now, and stop. Safe to call twice."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            self._relay()
        self._relay()

    def _size(self) -> int:
        with suppress(OSError):
            return os.stat(self._path).st_size
        return 0

    def _relay(self) -> None:
        if self._clock() - self._window_began >= WINDOW_S:
            self._begin_window()
        if self._size() < self.position:
            self.position, self._rest = 0, b""
        with suppress(OSError), self._path.open("rb") as log:
            log.seek(self.position)
            while data := log.read(_READ_BYTES):
                self.position += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                self._rest = self._rest[:_READ_BYTES]
                for line in lines:
                    self._log(line)

    def _log(self, line: bytes) -> None:
        if found := _LINE.fullmatch(line):
            level, text = getattr(logging, found[1].decode()), found[2]
        elif _FATAL.fullmatch(line):
            level, text = logging.ERROR, line
        else:
            return
        if self._relayed >= MAX_LINES:
            self._passed_over += 1
            return
        self._relayed += 1
        logger.log(level, "cache process: %s", text.decode(errors="replace"))

    def _begin_window(self) -> None:
        if self._passed_over:
            logger.warning(
                "cache process: %d more warnings and errors are in %s",
                self._passed_over,
                self._path,
            )
        self._window_began = self._clock()
        self._relayed = self._passed_over = 0
