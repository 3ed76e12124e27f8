"""The tiers below memory: whatever is stored goes to all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.cache.records import StoredChunk
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.interfaces import Region
from lmcache_kit.keys import ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.tier_base import Tier
    from lmcache_kit.cache.tiers.promotion import Promotions


class LowerTiers:
    """A :class:`~lmcache_kit.cache.records.ChangeListener` of the engine above them."""

    def __init__(
        self, tiers: Sequence[StoreTier], engine: CacheEngine, recalls: Promotions
    ) -> None:
        self.recalls = recalls
        self._tiers = tiers
        self._engine = engine

    def __iter__(self) -> Iterator[StoreTier]:
        return iter(self._tiers)

    def start(self) -> None:
        """Learn what lies there."""
        for tier in self._tiers:
            tier.start()

    def added(self, chunk: StoredChunk) -> None:
        """It is in memory: see to it that it is in all tiers."""
        self.send(chunk.key)

    def removed(self, key: ChunkKey) -> None:
        """It stays in the tiers."""

    def send(self, key: ChunkKey) -> None:
        """Have it written to all tiers that lack it, in the background."""
        for tier in self._tiers:
            if not tier.holds(key):
                tier.turns.send(partial(self._write, tier, key))

    def bring(self, source: Tier, keys: Sequence[ChunkKey], owner: Hashable) -> bool:
        """Have in memory what lies at ``source``, anchored for ``owner``; what is not there (any
        more) is passed over. False when memory has no room for all. Raises BackendError."""
        return not isinstance(source, StoreTier) or self.recalls.bring(source, keys, owner)

    def let_go(self, owner: Hashable) -> None:
        """What was brought for ``owner`` may leave memory."""
        self._engine.anchors.let_go(owner)

    def lower(self, goal: Tier, keys: Sequence[ChunkKey], owner: Hashable) -> None:
        """Have at ``goal`` chunks that are in memory, as far as it has room; where that is a tier,
        memory need not keep them for ``owner`` any longer. Raises BackendError."""
        if isinstance(goal, StoreTier):
            try:
                for key in keys:
                    goal.turns.do(partial(self._write, goal, key))
            finally:
                self.let_go(owner)

    def expire(self) -> None:
        """End what has outlived its time, and try again what failed."""
        for tier in self._tiers:
            tier.expire()

    def stats(self) -> dict[str, float]:
        """Figures of each tier, by its location."""
        return {
            f"{tier.location}_{name}": value
            for tier in self._tiers
            for name, value in tier.stats().items()
        }

    def close(self) -> None:
        """To be called before the engine's. Safe to call twice."""
        self.recalls.close()
        for tier in self._tiers:
            tier.close()

    def _write(self, tier: StoreTier, key: ChunkKey) -> None:
        if tier.holds(key):
            return
        lease, parcels = self._engine.transfers.lend([key], self)
        try:
            for parcel in parcels:
                [space] = self._engine.spaces([parcel.namespace])
                pieces = [
                    self._engine.memory.view(Region(extent.offset, extent.nbytes)).toreadonly()
                    for extent in parcel.extents
                ]
                tier.keep(parcel, space, pieces)
        finally:
            if lease:
                self._engine.release(lease, None)
