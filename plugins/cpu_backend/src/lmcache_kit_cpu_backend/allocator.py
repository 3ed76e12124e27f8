"""Best-fit allocator of page-aligned regions in one span of memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lmcache_kit.interfaces import Region

PAGE_BYTES = 4096
WALK_ALL_BLOCKS = 256
"""Up to so many blocks, an eviction plan looks at all of them."""
HOLES_TO_TRY = 8
"""Above that, it looks first around so many of the largest holes."""

_Block = tuple[int, Region | None]
"""Size in bytes, and the region, or None for a hole."""


def pages(nbytes: int) -> int:
    """Round ``nbytes`` up to whole pages, in bytes."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class Allocator:
    """Allocate regions of ``[0, capacity_bytes)`` in pages, best fit first.

    Of equally large holes the lowest is taken, and the rest of a hole stays at its upper end, so
    that memory that was used before is used again first. Neighbouring holes merge at once. Used
    blocks and holes tile the span without a gap: ``offset + size`` of a block is the offset of the
    next one.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        walk_all_blocks: int = WALK_ALL_BLOCKS,
        holes_to_try: int = HOLES_TO_TRY,
    ) -> None:
        self._walk_all_blocks = walk_all_blocks
        self._holes_to_try = holes_to_try
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self.requested_bytes = 0
        self.allocated_bytes = 0
        self._used: dict[int, int] = {}  # offset -> bytes asked for
        self._holes: dict[int, int] = {}  # offset -> size
        self._ending_at: dict[int, int] = {}  # end of a block -> its offset
        self._by_size: list[tuple[int, int]] = []  # (size, offset) of holes, sorted
        if self.capacity_bytes:
            self._add_hole(0, self.capacity_bytes)

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, region: Region) -> bool:
        return self._used.get(region.offset) == region.nbytes

    @property
    def largest_free_bytes(self) -> int:
        return self._by_size[-1][0] if self._by_size else 0

    def allocate(self, nbytes: int) -> Region | None:
        """Allocate a region, or return None when no hole is large enough."""
        if nbytes < 1:
            raise ValueError(f"cannot allocate {nbytes} bytes; at least 1")
        size = pages(nbytes)
        at = bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            return None
        hole, offset = self._by_size[at]
        self._remove_hole(offset)
        if hole > size:
            self._add_hole(offset + size, hole - size)
        self._used[offset] = nbytes
        self._ending_at[offset + size] = offset
        self.requested_bytes += nbytes
        self.allocated_bytes += size
        return Region(offset, nbytes)

    def free(self, region: Region) -> None:
        """Free a region. Raises ValueError for one that is not allocated."""
        if region not in self:
            raise ValueError(f"{region} is not allocated")
        del self._used[region.offset]
        start, end = region.offset, region.offset + pages(region.nbytes)
        del self._ending_at[end]
        self.requested_bytes -= region.nbytes
        self.allocated_bytes -= end - start
        below = self._ending_at.get(start, -1)
        if below in self._holes:
            self._remove_hole(below)
            start = below
        if end in self._holes:
            end += self._remove_hole(end)
        self._add_hole(start, end - start)

    def eviction_plan(
        self, nbytes: int, evictable: Callable[[Region], bool]
    ) -> list[Region] | None:
        """Return evictable regions whose release makes a hole of ``nbytes``, or None.

        The regions and the holes between them form one window. The search first takes the window
        with the fewest allocated bytes around the largest holes, in time proportional to the blocks
        in such windows. With few blocks, or when none of those holes will do, the search covers all
        windows, in time proportional to all blocks.
        """
        needed = pages(nbytes)
        if len(self._ending_at) > self._walk_all_blocks:
            largest = [offset for _, offset in self._by_size[-self._holes_to_try :]]
            around = [self._around(offset, needed) for offset in largest]
            found = [
                window for blocks in around if (window := _cheapest(blocks, needed, evictable))
            ]
            if found:
                return min(found)[1]
        window = _cheapest(self._upwards(0), needed, evictable)
        return window[1] if window else None

    def _around(self, hole: int, needed: int) -> list[_Block]:
        """Return the blocks that a window around this hole could contain."""
        left = _reach(self._downwards(hole), needed)
        return [*reversed(left), *_reach(self._upwards(hole), needed)]

    def _upwards(self, offset: int) -> Iterator[_Block]:
        while offset < self.capacity_bytes:
            block = self._block(offset)
            yield block
            offset += block[0]

    def _downwards(self, end: int) -> Iterator[_Block]:
        while end:
            end = self._ending_at[end]
            yield self._block(end)

    def _block(self, offset: int) -> _Block:
        nbytes = self._used.get(offset)
        if nbytes is None:
            return self._holes[offset], None
        return pages(nbytes), Region(offset, nbytes)

    def _add_hole(self, offset: int, size: int) -> None:
        self._holes[offset] = size
        self._ending_at[offset + size] = offset
        insort(self._by_size, (size, offset))

    def _remove_hole(self, offset: int) -> int:
        size = self._holes.pop(offset)
        del self._ending_at[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        return size


def _reach(blocks: Iterable[_Block], needed: int) -> list[_Block]:
    """Return the first blocks, until they add up to ``needed`` bytes."""
    reached: list[_Block] = []
    for block in blocks:
        if needed <= 0:
            break
        reached.append(block)
        needed -= block[0]
    return reached


def _cheapest(
    blocks: Iterable[_Block], needed: int, evictable: Callable[[Region], bool]
) -> tuple[int, list[Region]] | None:
    """Return the allocated bytes and the regions of the cheapest run of at least ``needed`` bytes.

    A sliding window over ``blocks``: only the shortest run that ends at each block is considered,
    and a region that is not evictable ends all runs before it. None when no run is long enough.
    """
    best: tuple[int, list[Region]] | None = None
    run: deque[_Block] = deque()
    size = cost = 0
    for block, region in blocks:
        if region and not evictable(region):
            run.clear()
            size = cost = 0
            continue
        run.append((block, region))
        size += block
        cost += block if region else 0
        while size - run[0][0] >= needed:
            first, gone = run.popleft()
            size -= first
            cost -= first if gone else 0
        if size >= needed and (best is None or cost < best[0]):
            best = cost, [each for _, each in run if each]
    return best
