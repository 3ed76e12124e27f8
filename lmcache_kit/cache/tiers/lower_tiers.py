"""The tiers below memory: every stored chunk is written to all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial

from lmcache_kit.cache.memory.memory_tier import MemoryTier
from lmcache_kit.cache.memory.transfers import GetCodec
from lmcache_kit.cache.records import StoredChunk
from lmcache_kit.cache.tier import Tier
from lmcache_kit.cache.tiers.promotion import Promotions
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.interfaces import Region
from lmcache_kit.keys import ChunkKey


class LowerTiers:
    """A :class:`~lmcache_kit.cache.records.ChangeListener` of the memory tier above them."""

    def __init__(self, tiers: Sequence[StoreTier], memory: MemoryTier, get_codec: GetCodec) -> None:
        self.promotions = Promotions(tiers, memory, get_codec)
        self._tiers = tiers
        self._memory = memory

    def __iter__(self) -> Iterator[StoreTier]:
        return iter(self._tiers)

    def start(self) -> None:
        """Scan the stores in the background."""
        for tier in self._tiers:
            tier.start()

    def added(self, chunk: StoredChunk) -> None:
        """Write a chunk that is complete in memory to all tiers."""
        self.enqueue_write(chunk.key)

    def removed(self, key: ChunkKey) -> None:
        """Keep a chunk that left memory in the tiers."""

    def enqueue_write(self, key: ChunkKey) -> None:
        """Write a chunk to all tiers that lack it, in the background."""
        for tier in self._tiers:
            if not tier.contains(key):
                tier.executor.enqueue(partial(self._write, tier, key))

    def promote(self, source: Tier, keys: Sequence[ChunkKey], owner: Hashable) -> bool:
        """Promote chunks of ``source`` into memory, referenced by ``owner``.

        Chunks that are not there (any more) are passed over. False when memory has no room for
        all. Raises BackendError.
        """
        return not isinstance(source, StoreTier) or self.promotions.promote(
            source.store, keys, owner
        )

    def release(self, owner: Hashable) -> None:
        """Drop the references to what was promoted for ``owner``."""
        self._memory.references.release(owner)

    def offload(self, goal: Tier, keys: Sequence[ChunkKey], owner: Hashable) -> None:
        """Write chunks that are in memory to ``goal``, as far as it has room.

        For a store tier the references of ``owner`` end. Raises BackendError.
        """
        if isinstance(goal, StoreTier):
            try:
                for key in keys:
                    goal.executor.call(partial(self._write, goal, key))
            finally:
                self.release(owner)

    def expire(self) -> None:
        """End pins whose time is over, and try again what failed."""
        for tier in self._tiers:
            tier.expire()

    def stats(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each tier, by its location."""
        return {tier.location: tier.stats() for tier in self._tiers}

    def close(self) -> None:
        """Close before the engine does. Safe to call twice."""
        self.promotions.close()
        for tier in self._tiers:
            tier.close()

    def _write(self, tier: StoreTier, key: ChunkKey) -> None:
        if tier.contains(key):
            return
        lease, descriptors = self._memory.transfers.lease([key], self)
        try:
            for descriptor in descriptors:
                [namespace] = self._memory.namespaces([descriptor.namespace])
                pieces = [
                    self._memory.backend.view(Region(extent.offset, extent.nbytes)).toreadonly()
                    for extent in descriptor.extents
                ]
                tier.store.write_if_absent(descriptor, namespace, pieces)
        finally:
            if lease:
                self._memory.release(lease, None)
