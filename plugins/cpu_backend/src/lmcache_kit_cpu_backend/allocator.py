"""Who has which part of a span of memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable

from lmcache_kit.interfaces import Region

PAGE_BYTES = 4096


def pages(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages, in bytes."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class Allocator:
    """Best fit over ``[0, capacity_bytes)`` in pages; neighbouring holes merge at once.

    Of equally large holes the lowest is taken, and the rest of a hole stays at its upper end, so
    that memory which has been used before is used again first. Used blocks and holes tile the
    span without a gap: ``offset + size`` of one is the offset of the next.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self.requested_bytes = 0
        self.allocated_bytes = 0
        self._used: dict[int, int] = {}  # offset -> bytes asked for
        self._holes: dict[int, int] = {}  # offset -> size
        self._hole_ending_at: dict[int, int] = {}  # end -> offset
        self._by_size: list[tuple[int, int]] = []  # (size, offset), sorted
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
        self.requested_bytes += nbytes
        self.allocated_bytes += size
        return Region(offset, nbytes)

    def free(self, region: Region) -> None:
        """Raises ValueError for a region that is not allocated."""
        if region not in self:
            raise ValueError(f"{region} is not allocated")
        del self._used[region.offset]
        start, end = region.offset, region.offset + pages(region.nbytes)
        self.requested_bytes -= region.nbytes
        self.allocated_bytes -= end - start
        below = self._hole_ending_at.get(start)
        if below is not None:
            self._remove_hole(below)
            start = below
        above = self._holes.get(end)
        if above is not None:
            self._remove_hole(end)
            end += above
        self._add_hole(start, end - start)

    def clearance(self, nbytes: int, movable: Callable[[Region], bool]) -> list[Region] | None:
        """The window of neighbouring holes and movable regions that is large enough and in which
        the fewest bytes are allocated; None when there is none. One walk over all blocks."""
        needed = pages(nbytes)
        best: list[Region] | None = None
        best_cost = self.capacity_bytes + 1
        window: deque[tuple[int, Region | None]] = deque()
        size = cost = offset = 0
        while offset < self.capacity_bytes:
            hole = self._holes.get(offset)
            region = None if hole else Region(offset, self._used[offset])
            block = hole if region is None else pages(region.nbytes)
            assert block is not None
            offset += block
            if region is not None and not movable(region):
                window.clear()
                size = cost = 0
                continue
            window.append((block, region))
            size += block
            cost += block if region else 0
            while size - window[0][0] >= needed:
                first, gone = window.popleft()
                size -= first
                cost -= first if gone else 0
            if size >= needed and cost < best_cost:
                best_cost = cost
                best = [each for _, each in window if each]
        return best

    def _add_hole(self, offset: int, size: int) -> None:
        self._holes[offset] = size
        self._hole_ending_at[offset + size] = offset
        insort(self._by_size, (size, offset))

    def _remove_hole(self, offset: int) -> None:
        size = self._holes.pop(offset)
        del self._hole_ending_at[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
