"""Who has which part of a span of memory."""

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
"""Size, and the region if it is not a hole."""


def pages(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages, in bytes."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class Allocator:
    """Best fit over ``[0, capacity_bytes)`` in pages; neighbouring holes merge at once.

    Of equally large holes the lowest is taken, and the rest of a hole stays at its upper end, so
    that memory which has been used before is used again first. Used blocks and holes tile the
    span without a gap: ``offset + size`` of one is the offset of the next.
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
        """None when no hole is large enough."""
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
        """Raises ValueError for a region that is not allocated."""
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
        """Movable regions that together with the holes between them make room; None if there
        are none.

        The fewest allocated bytes among all windows around the largest holes; among all windows
        when there are few blocks, or none of those holes will do. The first takes time in
        proportion to the number of blocks in such a window, the second to that of all.
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
        """Blocks that a window with this hole in it could have."""
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
    """The first blocks, ``needed`` bytes of them."""
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
    """Of all runs of blocks of at least ``needed`` bytes the one that has the fewest allocated:
    that number, and the regions in it. Only the shortest run that ends at each block counts."""
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
