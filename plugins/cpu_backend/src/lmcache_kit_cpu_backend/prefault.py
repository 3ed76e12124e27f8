"""Prefaulting: populate pages of the memory ahead of their first use."""

from __future__ import annotations

import ctypes
import mmap
import threading

AHEAD_BYTES = 64 << 20
_STEP_BYTES = 4 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not name it


class Prefault:
    """Populate the pages that will be allocated next, on a thread.

    The first write to a page waits until the system has found and cleared the page, which costs
    several times the copy itself. The thread therefore stays at most 64 MiB ahead of the highest
    offset ever allocated. On a kernel without MADV_POPULATE_WRITE the thread ends, and workers wait
    at their first writes.
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
        """Note that memory below ``end`` is allocated. Never blocks."""
        if end <= self._used:
            return
        self._used = end
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
            self._thread.start()
        if self._touched < min(self._nbytes, end + AHEAD_BYTES):
            self._wake.set()

    def close(self) -> None:
        """Stop the thread and drop the reference to the memory."""
        self._stop = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        del self._anchor

    def _run(self) -> None:
        # Through ctypes, because mmap.madvise() holds the GIL.
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        start = ctypes.addressof(self._anchor)
        while self._touched < self._nbytes:
            self._wake.wait()
            self._wake.clear()
            while self._touched < min(self._nbytes, self._used + AHEAD_BYTES):
                # Skip pages that are allocated already: their workers touch them.
                begin = max(self._touched, self._used // mmap.PAGESIZE * mmap.PAGESIZE)
                nbytes = min(_STEP_BYTES, self._nbytes - begin)
                if self._stop or (nbytes and madvise(start + begin, nbytes, MADV_POPULATE_WRITE)):
                    return
                self._touched = begin + nbytes
            if self._stop:
                return
