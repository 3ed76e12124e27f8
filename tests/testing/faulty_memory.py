"""A memory backend that is right, and many that are wrong in one thing each.

``CAUGHT_BY``: the check of the suite that is there for it.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os

import msgspec
import pytest
from hypothesis import Phase, settings

from lmcache_kit.interfaces import MemoryBackend, Region, Usage
from lmcache_kit.testing import MemoryBackendSuite

UNIT = 64
# Nobody reads these examples, so none is made small.
settings.register_profile("quick", phases=[Phase.generate], database=None)
settings.load_profile("quick")


def rounded(nbytes):
    return -(-nbytes // UNIT) * UNIT


class Right(MemoryBackend):
    """First fit over a list."""

    flags = mmap.MAP_SHARED

    def __init__(self, capacity_bytes):
        self.capacity = self.round_capacity(capacity_bytes)
        self._fd = os.memfd_create("test")
        os.ftruncate(self._fd, self.capacity)
        self._map = mmap.mmap(self._fd, self.capacity, flags=self.flags)
        self._memory = memoryview(self._map)
        self.used = {}

    def round_capacity(self, nbytes):
        return nbytes // UNIT * UNIT

    @property
    def fd(self):
        return self._fd

    @property
    def memory(self):
        return self._memory

    def holes(self):
        at = 0
        for offset, nbytes in sorted(self.used.items()):
            if offset > at:
                yield at, offset - at
            at = offset + rounded(nbytes)
        if self.capacity > at:
            yield at, self.capacity - at

    def allocate(self, nbytes):
        self.check_open()
        if nbytes < 1:
            raise ValueError("at least 1")
        for offset, size in self.holes():
            if size >= rounded(nbytes):
                self.used[offset] = nbytes
                return Region(offset, nbytes)
        return None

    def free(self, region):
        if self.used.get(region.offset) != region.nbytes:
            raise ValueError("not allocated")
        del self.used[region.offset]

    def eviction_plan(self, nbytes, evictable):
        blocks = [(at, size, None) for at, size in self.holes()]
        blocks += [(at, rounded(n), Region(at, n)) for at, n in self.used.items()]
        blocks.sort(key=lambda block: block[0])
        found = []
        for first in range(len(blocks)):
            size, cost, named = 0, 0, []
            for _, nbytes_here, region in blocks[first:]:
                if region and not evictable(region):
                    break
                size += nbytes_here
                if region:
                    cost += nbytes_here
                    named.append(region)
                if size >= rounded(nbytes):
                    found.append((cost, named))
                    break
        return min(found)[1] if found else None

    def view(self, region):
        self.check_open()
        return self._memory[region.offset : region.offset + region.nbytes]

    def usage(self):
        return Usage(
            capacity_bytes=self.capacity,
            requested_bytes=sum(self.used.values()),
            allocated_bytes=sum(map(rounded, self.used.values())),
            regions=len(self.used),
            largest_free_bytes=max((size for _, size in self.holes()), default=0),
        )

    def close(self):
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._memory.release()
            with contextlib.suppress(BufferError):
                self._map.close()

    def check_open(self):
        if self._fd < 0:
            raise ValueError("closed")


class Overlaps(Right):
    """What is rounded down begins in its neighbour."""

    def allocate(self, nbytes):
        region = super().allocate(nbytes)
        if region and region.offset and nbytes > 3 * UNIT:
            del self.used[region.offset]
            region = Region(region.offset - UNIT, nbytes)
            self.used[region.offset] = nbytes
        return region


class Miscounts(Right):
    freed = 0

    def free(self, region):
        super().free(region)
        self.freed += region.nbytes > 5000

    def usage(self):
        usage = super().usage()
        return msgspec.structs.replace(usage, requested_bytes=usage.requested_bytes + self.freed)


class NeverMerges(Right):
    """What was cut once stays cut."""

    def __init__(self, capacity_bytes):
        super().__init__(capacity_bytes)
        self.cuts = set()

    def holes(self):
        for at, size in super().holes():
            end = at + size
            edges = sorted({at, end, *(cut for cut in self.cuts if at < cut < end)})
            yield from ((low, high - low) for low, high in itertools.pairwise(edges))

    def allocate(self, nbytes):
        region = super().allocate(nbytes)
        if region:
            self.cuts |= {region.offset, region.offset + rounded(nbytes)}
        return region


class FreesAnything(Right):
    def free(self, region):
        self.used.pop(region.offset, None)


class GivesUpClearing(Right):
    """Only single regions are tried."""

    def eviction_plan(self, nbytes, evictable):
        named = super().eviction_plan(nbytes, evictable)
        return named if named is None or len(named) < 2 else None


class ClearsEverything(Right):
    def eviction_plan(self, nbytes, evictable):
        named = super().eviction_plan(nbytes, evictable)
        regions = [Region(*each) for each in self.used.items()]
        return named and [each for each in regions if evictable(each)]


class ClearsThePinned(Right):
    def eviction_plan(self, nbytes, evictable):
        return super().eviction_plan(nbytes, lambda _: True)


class ClearsAtOnce(Right):
    """Frees what it was only asked to name."""

    def eviction_plan(self, nbytes, evictable):
        named = super().eviction_plan(nbytes, evictable)
        for region in named or []:
            self.free(region)
        return named


class ViewsCopies(Right):
    def view(self, region):
        return memoryview(bytearray(super().view(region)))


class MapsPrivately(Right):
    flags = mmap.MAP_PRIVATE


class Lengthens(Right):
    def allocate(self, nbytes):
        region = super().allocate(nbytes)
        return region and Region(region.offset, rounded(nbytes))


class LeaksItsDescriptor(Right):
    def __init__(self, capacity_bytes):
        super().__init__(capacity_bytes)
        self.another = os.dup(self._fd)


class ServesAfterClose(Right):
    def check_open(self):
        pass


class TakesMoreThanItMay(Right):
    def round_capacity(self, nbytes):
        return nbytes + 4096


class ClosesOnce(Right):
    def close(self):
        os.close(self._fd)
        self._fd = -1


class ShowsAnotherMemory(Right):
    @property
    def memory(self):
        return memoryview(self._map)


class PromisesAllThatIsFree(Right):
    def usage(self):
        usage = super().usage()
        return msgspec.structs.replace(usage, largest_free_bytes=usage.free_bytes)


class WipesItsNeighbour(Right):
    def free(self, region):
        super().free(region)
        end = region.offset + region.nbytes
        wiped = self._memory[region.offset : end + UNIT]
        wiped[:] = bytes(len(wiped))


class HandsOutNothing(Right):
    """An allocation of no bytes is one."""

    def allocate(self, nbytes):
        return super().allocate(max(nbytes, 1))


CAUGHT_BY = {
    Overlaps: "test_any_history_is_exact",
    Miscounts: "test_a_long_history_is_exact",
    NeverMerges: "test_holes_merge",
    FreesAnything: "test_a_region_that_is_not_allocated_cannot_be_freed",
    GivesUpClearing: "test_eviction_plan_makes_room_whenever_it_can_be_made",
    ClearsEverything: "test_eviction_plan_names_nothing_in_vain",
    ClearsThePinned: "test_eviction_plan_makes_room_whenever_it_can_be_made",
    ClearsAtOnce: "test_eviction_plan_makes_room_whenever_it_can_be_made",
    ViewsCopies: "test_views_memory_and_descriptor_show_the_same_bytes",
    MapsPrivately: "test_views_memory_and_descriptor_show_the_same_bytes",
    Lengthens: "test_a_region_is_as_long_as_asked",
    LeaksItsDescriptor: "test_closing_gives_everything_back",
    ServesAfterClose: "test_a_closed_backend_hands_nothing_out",
    TakesMoreThanItMay: "test_a_new_one_is_empty",
    ClosesOnce: "test_closing_twice_is_fine",
    ShowsAnotherMemory: "test_memory_is_all_of_it_and_stays_the_same_object",
    PromisesAllThatIsFree: "test_usage_is_honest_about_fragments",
    WipesItsNeighbour: "test_a_long_history_is_exact",
    HandsOutNothing: "test_less_than_a_byte_cannot_be_had",
}


def suite_of(made):
    class Made(MemoryBackendSuite):
        @pytest.fixture
        def make_memory(self):
            return made

    Made.__name__ = Made.__qualname__ = f"Test{made.__name__}"
    return Made


globals().update({f"Test{each.__name__}": suite_of(each) for each in (Right, *CAUGHT_BY)})
