"""Touching memory ahead of its first use."""

from __future__ import annotations

import ctypes
import mmap
import threading

AHEAD_BYTES = 64 << 20
_STEP_BYTES = 4 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not name it


class Prefault:
    """Has the system provide the pages that will be handed out next, in a thread.

    A worker that writes to a page for the first time waits until the system has found and cleared
    it, which costs several times the copy itself. So the thread keeps at most 64 MiB in front of
    the highest offset ever used. Where the system cannot do that, workers wait as they would.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._nbytes = len(memory)
        self._anchor = ctypes.c_char.from_buffer(memory)
        self._used = 0
        self._touched = 0
        self._wake = threading.Event()
        self._stop = False
        self._thread: threading.Thread | None = None

    def used_up_to(self, end: int) -> None:
        """Memory below ``end`` is handed out. Never waits."""
        if end <= self._used:
            return
        self._used = end
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
            self._thread.start()
        if self._touched < min(self._nbytes, end + AHEAD_BYTES):
            self._wake.set()

    def close(self) -> None:
        """Let go of the memory."""
        self._stop = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        del self._anchor

    def _run(self) -> None:
        # Through ctypes, because mmap.madvise() keeps the interpreter's lock.
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        start = ctypes.addressof(self._anchor)
        while self._touched < self._nbytes:
            self._wake.wait()
            self._wake.clear()
            while self._touched < min(self._nbytes, self._used + AHEAD_BYTES):
                # What is handed out already is being touched by the worker that has it.
                begin = max(self._touched, self._used // mmap.PAGESIZE * mmap.PAGESIZE)
                nbytes = min(_STEP_BYTES, self._nbytes - begin)
                if self._stop or (nbytes and madvise(start + begin, nbytes, MADV_POPULATE_WRITE)):
                    return
                self._touched = begin + nbytes
            if self._stop:
                return
