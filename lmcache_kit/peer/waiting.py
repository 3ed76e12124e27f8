"""Wait until something changes in an engine: room is freed, or a store ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine

POLL_S = 0.05


def wait_for_change(engine: CacheEngine, timeout_s: float) -> None:
    """Return after a change in the engine, or after ``timeout_s`` seconds; perhaps earlier."""
    time.sleep(min(POLL_S, timeout_s))
