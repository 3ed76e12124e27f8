"""Wait for changes in an engine: room that is freed, a store that ends.

The engine has no condition to wait on that moves can see yet, so these poll; nothing else does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.keys import ChunkKey

POLL_S = 0.05


def wait_for_change(engine: CacheEngine, timeout_s: float) -> None:
    """Return after a change in memory, or after ``timeout_s`` seconds; perhaps earlier."""
    time.sleep(min(POLL_S, timeout_s))


def wait_until_stored(engine: CacheEngine, keys: Sequence[ChunkKey], timeout_s: float) -> None:
    """Return when all these chunks are complete in memory, or after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not all(map(engine.contains, keys)):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(POLL_S, left_s))
