"""Scheduling priority: moves yield the processor to serving."""

from __future__ import annotations

import os
import threading

NICE = 10


def lower_priority() -> None:
    """Raise the nice value of the calling thread, which copies or hashes in bulk.

    On a free core it is as fast as before.
    """
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICE:
        os.setpriority(os.PRIO_PROCESS, thread, NICE)
