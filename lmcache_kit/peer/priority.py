"""Moves wait for serving, not the other way round."""

from __future__ import annotations

import os
import threading

NICE = 10


def lower_priority() -> None:
    """Let the calling thread yield to all that do not: it copies or hashes in bulk, on cores that
    a server may want. Where a core is free it is as quick as before."""
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICE:
        os.setpriority(os.PRIO_PROCESS, thread, NICE)
