"""Bring chunks of a tier into memory for a move, waiting for room there."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.tier import Tier
    from lmcache_kit.keys import ChunkKey

ROOM_S = 5.0
"""How long a move waits until others have freed room in memory."""
PAUSE_S = 0.02
LONGEST_WAIT_S = 0.5


def promote(
    engine: CacheEngine,
    tier: Tier,
    keys: Sequence[ChunkKey],
    owner: Hashable,
    timeout_s: float,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> bool:
    """Have in memory what ``tier`` has of these chunks, referenced by ``owner``.

    Return False when memory has no room for all of them for ``timeout_s`` seconds; those that it
    has room for are there then. Between two attempts all references of ``owner`` are released, so
    that moves which wait for each other's memory do not wait for ever. Raises BackendError.

    A wait ends with any change in memory. Releasing is such a change, so two waiting moves would
    wake each other without end: each pauses before its next attempt. A change between a failed
    attempt and its release goes unnoticed, so no wait is longer than ``LONGEST_WAIT_S``.
    """
    tiers = engine.lower_tiers
    if tiers is None or tier is engine.memory_tier:
        return True
    deadline = time.monotonic() + timeout_s
    while not tiers.promote(tier, keys, owner):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or cancelled():
            return False
        tiers.release(owner)
        version = engine.memory_tier.version
        engine.memory_tier.wait_for_change(version, min(left_s, LONGEST_WAIT_S))
        time.sleep(min(left_s, PAUSE_S))
    return True
