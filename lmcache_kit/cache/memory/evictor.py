"""Making room: which chunks leave so that others can come."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import ChunkIndex, MemoryIndex
    from lmcache_kit.cache.index.entries import Entry
    from lmcache_kit.interfaces import Region
    from lmcache_kit.keys import ChunkKey


class Evictor:
    """Takes memory for one batch, and evicts for it what must go.

    A chunk leaves only after all that follow it have left, because they could not be found
    without it; among those that may leave the policy's order holds. Nothing in use, pinned,
    being moved, pending or in ``keep`` leaves, and nothing at all for a request that cannot be
    granted. ``wanted_bytes`` is what the whole batch may need: victims are looked for once. What
    leaves is counted; ``evicted_for_space_total``: out of the policy's order, because of where it
    lay.
    """

    def __init__(
        self, index: MemoryIndex, counters: Counter[str], keep: Set[ChunkKey], wanted_bytes: int
    ) -> None:
        self._index = index
        self._counters = counters
        self._keep = keep
        self._wanted_bytes = wanted_bytes
        self._victims: deque[Entry] = deque()
        self._weight = 0
        self._hopeless_bytes = index.capacity_bytes + 1

    def take_all(self, sizes: Sequence[int]) -> list[Region]:
        """Memory of each of these sizes, or none."""
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
        """``nbytes`` of memory, or None when nothing that may leave would make room for it."""
        if nbytes >= self._hopeless_bytes:
            return None
        memory = self._index.memory
        region = memory.allocate(nbytes)
        if region is None and self._can_win(nbytes):
            region = self._evict_by_policy(nbytes) or self._clear(nbytes)
        if region is None:
            self._hopeless_bytes = nbytes
        return region

    def _can_win(self, nbytes: int) -> bool:
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
        return self._index.memory.eviction_plan(nbytes, self._evictable) is not None

    def _look_for_victims(self, nbytes: int) -> None:
        self._victims.clear()
        self._weight = 0
        for victim in leaving(self._index, self._may_leave):
            self._victims.append(victim)
            self._weight += victim.nbytes
            if self._weight >= max(self._wanted_bytes, nbytes):
                break

    def _evict_by_policy(self, nbytes: int) -> Region | None:
        """Evict in order until there is a hole, or as many bytes are free as are needed."""
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

    def _clear(self, nbytes: int) -> Region | None:
        """Evict the cheapest neighbours, whatever the policy thinks of them."""
        for region in self._index.memory.eviction_plan(nbytes, self._evictable) or ():
            entry = self._index.owner_of(region)
            if entry is not None and entry.linked:
                self._evict(entry)
                self._counters["evicted_for_space_total"] += 1
        return self._index.memory.allocate(nbytes)

    def _evict(self, entry: Entry) -> None:
        self._counters["evicted_chunks_total"] += 1
        self._counters["evicted_bytes_total"] += entry.nbytes
        self._index.unlink(entry)

    def _may_leave(self, entry: Entry) -> bool:
        held = entry.payload.ref_count or entry.pins or entry.ref_count
        return entry.linked and entry.complete and not held and entry.key not in self._keep

    def _evictable(self, region: Region) -> bool:
        entry = self._index.owner_of(region)
        return entry is not None and self._may_leave(entry)


def leaving(index: ChunkIndex, may_leave: Callable[[Entry], bool]) -> Iterator[Entry]:
    """Chunks in the order in which they may leave: always the first one, as the policy has it, of
    those that nothing stays behind."""
    entries = index.entries
    passed: set[ChunkKey] = set()
    gone_children: dict[ChunkKey, int] = {}

    def is_last(key: ChunkKey) -> bool:
        return index.followers(key) == gone_children.get(key, 0)

    for key in index.policy.victims():
        entry = entries[key]
        if not may_leave(entry):
            continue
        if not is_last(key):
            passed.add(key)
            continue
        while True:
            yield entry
            gone_children[entry.parent] = gone_children.get(entry.parent, 0) + 1
            # A parent that was passed over comes before all that has not been seen yet.
            if entry.parent not in passed or not is_last(entry.parent):
                break
            entry = entries[entry.parent]
