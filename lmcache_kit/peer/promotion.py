"""Bring chunks of a tier into memory for a move, waiting for room there."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from lmcache_kit.peer.waiting import wait_for_change

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.tier_base import Tier
    from lmcache_kit.keys import ChunkKey

ROOM_S = 5.0
"""How long a move waits until others have freed room in memory."""


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
    """
    tiers = engine.lower_tiers
    if tiers is None or tier is engine:
        return True
    deadline = time.monotonic() + timeout_s
    while not tiers.promote(tier, keys, owner):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or cancelled():
            return False
        tiers.release(owner)
        wait_for_change(engine, left_s)
    return True
