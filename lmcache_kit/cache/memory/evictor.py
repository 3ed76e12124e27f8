"""The evictor: which chunks leave memory so that an allocation succeeds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set

from lmcache_kit.cache.index.entries import Entry
from lmcache_kit.cache.index.eviction_order import eviction_order
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.memory.memory_index import MemoryIndex
from lmcache_kit.interfaces import Region
from lmcache_kit.keys import ChunkKey


class Evictor:
    """Allocates memory for one batch, and evicts chunks for it. Used under the tier's lock.

    A chunk leaves after all chunks that follow it, otherwise in the policy's order. A chunk that
    is in use, pinned, referenced, pending or in ``keep`` does not leave, and no chunk does for a
    request that cannot be granted. ``wanted_bytes``: the most that the batch may need, so that
    victims are looked for once. ``evicted_for_space_total`` counts chunks that left out of the
    policy's order, because of their place in memory.
    """

    def __init__(
        self, state: TierState[MemoryIndex], keep: Set[ChunkKey], wanted_bytes: int
    ) -> None:
        self._index = state.index
        self._counters = state.counters
        self._keep = keep
        self._wanted_bytes = wanted_bytes
        self._victims: deque[Entry] = deque()
        self._weight = 0
        self._hopeless_bytes = state.index.capacity_bytes + 1

    def take_all(self, sizes: Sequence[int]) -> list[Region]:
        """Allocate a region of each size, or none at all."""
        regions: list[Region] = []
        for nbytes in sizes:
            region = self.take(nbytes)
            if region is None:
                for taken in regions:
                    self._index.free(taken)
                return []
            regions.append(region)
        return regions

    def take(self, nbytes: int) -> Region | None:
        """Allocate a region; None when no eviction would make room for it."""
        if nbytes >= self._hopeless_bytes:
            return None
        memory = self._index.memory
        region = memory.allocate(nbytes)
        if region is None and self._can_succeed(nbytes):
            region = self._evict_by_policy(nbytes) or self._evict_neighbours(nbytes)
        if region is None:
            self._hopeless_bytes = nbytes
        return region

    def _can_succeed(self, nbytes: int) -> bool:
        # A victim that is large enough by itself settles it without asking the memory.
        if self._weight < nbytes:
            self._look_for_victims(nbytes)
        freed = 0
        for victim in self._victims:
            if victim.linked and victim.payload.regions[0].nbytes >= nbytes:
                return True
            freed += victim.nbytes
            if freed >= nbytes:
                break
        return self._index.memory.eviction_plan(nbytes, self._is_evictable_region) is not None

    def _look_for_victims(self, nbytes: int) -> None:
        self._victims.clear()
        self._weight = 0
        for victim in eviction_order(self._index, self._is_evictable):
            self._victims.append(victim)
            self._weight += victim.nbytes
            if self._weight >= max(self._wanted_bytes, nbytes):
                break

    def _evict_by_policy(self, nbytes: int) -> Region | None:
        """Evict in the policy's order until an allocation succeeds or ``nbytes`` were freed."""
        freed = 0
        while freed < nbytes and self._victims:
            victim = self._victims.popleft()
            self._weight -= victim.nbytes
            if not victim.linked:  # it went to clear space for an earlier one
                continue
            freed += victim.nbytes
            self._evict(victim)
            region = self._index.memory.allocate(nbytes)
            if region is not None:
                return region
        return None

    def _evict_neighbours(self, nbytes: int) -> Region | None:
        """Evict the cheapest neighbours, in disregard of the policy."""
        for region in self._index.memory.eviction_plan(nbytes, self._is_evictable_region) or ():
            entry = self._index.owner_of(region)
            if entry is not None and entry.linked:
                self._evict(entry)
                self._counters["evicted_for_space_total"] += 1
        return self._index.memory.allocate(nbytes)

    def _evict(self, entry: Entry) -> None:
        self._counters["evicted_chunks_total"] += 1
        self._counters["evicted_bytes_total"] += entry.nbytes
        self._index.unlink(entry)

    def _is_evictable(self, entry: Entry) -> bool:
        held = entry.payload.ref_count or entry.pins or entry.ref_count
        return entry.linked and entry.complete and not held and entry.key not in self._keep

    def _is_evictable_region(self, region: Region) -> bool:
        entry = self._index.owner_of(region)
        return entry is not None and self._is_evictable(entry)
