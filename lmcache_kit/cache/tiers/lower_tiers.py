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
        self, tiers: Sequence[StoreTier], engine: CacheEngine, promotions: Promotions
    ) -> None:
        self.promotions = promotions
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
        self.enqueue_write(chunk.key)

    def removed(self, key: ChunkKey) -> None:
        """It stays in the tiers."""

    def enqueue_write(self, key: ChunkKey) -> None:
        """Have it written to all tiers that lack it, in the background."""
        for tier in self._tiers:
            if not tier.contains(key):
                tier.executor.enqueue(partial(self._write, tier, key))

    def promote(self, source: Tier, keys: Sequence[ChunkKey], owner: Hashable) -> bool:
        """Have in memory what lies at ``source``, anchored for ``owner``; what is not there (any
        more) is passed over. False when memory has no room for all. Raises BackendError."""
        return not isinstance(source, StoreTier) or self.promotions.promote(source, keys, owner)

    def release(self, owner: Hashable) -> None:
        """What was brought for ``owner`` may leave memory."""
        self._engine.references.release(owner)

    def offload(self, goal: Tier, keys: Sequence[ChunkKey], owner: Hashable) -> None:
        """Have at ``goal`` chunks that are in memory, as far as it has room; where that is a tier,
        memory need not keep them for ``owner`` any longer. Raises BackendError."""
        if isinstance(goal, StoreTier):
            try:
                for key in keys:
                    goal.executor.call(partial(self._write, goal, key))
            finally:
                self.release(owner)

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
        self.promotions.close()
        for tier in self._tiers:
            tier.close()

    def _write(self, tier: StoreTier, key: ChunkKey) -> None:
        if tier.contains(key):
            return
        lease, descriptors = self._engine.transfers.lease([key], self)
        try:
            for descriptor in descriptors:
                [namespace] = self._engine.namespaces([descriptor.namespace])
                pieces = [
                    self._engine.memory.view(Region(extent.offset, extent.nbytes)).toreadonly()
                    for extent in descriptor.extents
                ]
                tier.keep(descriptor, namespace, pieces)
        finally:
            if lease:
                self._engine.release(lease, None)
