from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lmcache_kit_cpu_backend.allocator import PAGE_BYTES, Allocator, pages

from lmcache_kit.interfaces import Region

PAGES = 48


def take(allocator: Allocator, nbytes: int) -> Region:
    region = allocator.allocate(nbytes)
    assert region
    return region


class Bitmap:
    """The naive twin: one flag per page."""

    def __init__(self, size: int) -> None:
        self.taken = [False] * size

    def runs(self) -> list[tuple[int, int]]:
        """(length, start) of every free run."""
        found: list[tuple[int, int]] = []
        start: int | None = None
        for at, taken in enumerate([*self.taken, True]):
            if taken and start is not None:
                found.append((at - start, start))
                start = None
            elif not taken and start is None:
                start = at
        return found

    def best_fit(self, size: int) -> int | None:
        fitting = [run for run in self.runs() if run[0] >= size]
        return min(fitting)[1] if fitting else None

    def mark(self, start: int, size: int, taken: bool) -> None:
        for at in range(start, start + size):
            assert self.taken[at] is not taken
            self.taken[at] = taken


class AllocatorAgainstBitmap(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(PAGES * PAGE_BYTES + 17)
        self.bitmap = Bitmap(PAGES)
        self.regions: list[Region] = []

    @rule(nbytes=st.integers(1, 12 * PAGE_BYTES) | st.just(PAGES * PAGE_BYTES))
    def allocate(self, nbytes: int) -> None:
        size = pages(nbytes) // PAGE_BYTES
        expected = self.bitmap.best_fit(size)
        region = self.allocator.allocate(nbytes)
        if expected is None:
            assert region is None
            return
        assert region == Region(expected * PAGE_BYTES, nbytes)
        self.bitmap.mark(expected, size, True)
        self.regions.append(region)

    @precondition(lambda self: self.regions)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        region = data.draw(st.sampled_from(self.regions))
        self.release(region)

    def release(self, region: Region) -> None:
        self.allocator.free(region)
        self.regions.remove(region)
        size = pages(region.nbytes) // PAGE_BYTES
        self.bitmap.mark(region.offset // PAGE_BYTES, size, False)

    @rule(data=st.data(), nbytes=st.integers(1, PAGES * PAGE_BYTES))
    def clear(self, data: st.DataObject, nbytes: int) -> None:
        fixed = data.draw(st.sets(st.sampled_from(self.regions))) if self.regions else set()
        cheapest = self.cheapest(pages(nbytes) // PAGE_BYTES, fixed)
        cleared = self.allocator.eviction_plan(nbytes, lambda region: region not in fixed)
        if cheapest is None:
            assert cleared is None
            return
        assert cleared is not None
        assert not fixed.intersection(cleared)
        assert sum(pages(region.nbytes) for region in cleared) == cheapest
        for region in cleared:
            self.release(region)
        taken = self.allocator.allocate(nbytes)
        assert taken is not None
        self.allocator.free(taken)

    def cheapest(self, size: int, fixed: set[Region]) -> int | None:
        costs = []
        for start in range(PAGES - size + 1):
            low, high = start * PAGE_BYTES, (start + size) * PAGE_BYTES
            inside = [
                region
                for region in self.regions
                if region.offset < high and region.offset + pages(region.nbytes) > low
            ]
            if not fixed.intersection(inside):
                costs.append(sum(pages(region.nbytes) for region in inside))
        return min(costs, default=None)

    @invariant()
    def accounts_agree(self) -> None:
        allocator = self.allocator
        assert len(allocator) == len(self.regions)
        assert allocator.requested_bytes == sum(region.nbytes for region in self.regions)
        assert allocator.allocated_bytes == sum(self.bitmap.taken) * PAGE_BYTES
        assert allocator.capacity_bytes == PAGES * PAGE_BYTES
        largest = max((length for length, _ in self.bitmap.runs()), default=0)
        assert allocator.largest_free_bytes == largest * PAGE_BYTES


TestAllocatorAgainstBitmap = AllocatorAgainstBitmap.TestCase
TestAllocatorAgainstBitmap.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(4, 20))
def test_with_many_blocks_the_windows_around_large_holes_make_room_too(
    seed: int, needed_pages: int
) -> None:
    random = Random(seed)
    allocator = Allocator(700 * PAGE_BYTES)
    regions = []
    while region := allocator.allocate(random.randint(1, 3) * PAGE_BYTES):
        regions.append(region)
    gone = set(random.sample(regions, random.randrange(30)))
    for region in gone:
        allocator.free(region)
    left = [region for region in regions if region not in gone]
    fixed = set(random.sample(left, random.randrange(20)))
    nbytes = needed_pages * PAGE_BYTES

    cleared = allocator.eviction_plan(nbytes, lambda region: region not in fixed)

    assert cleared is not None
    assert not fixed.intersection(cleared)
    assert sum(pages(region.nbytes) for region in cleared) <= nbytes + 2 * PAGE_BYTES
    for region in cleared:
        allocator.free(region)
    assert allocator.allocate(nbytes) is not None


def test_a_large_memory_whose_large_holes_are_walled_in_is_searched_as_a_whole() -> None:
    allocator = Allocator(8 * PAGE_BYTES, walk_all_blocks=0, holes_to_try=1)
    regions = [take(allocator, PAGE_BYTES) for _ in range(8)]
    allocator.free(regions[1])
    walls = {regions[0], regions[2]}
    assert (
        allocator.eviction_plan(3 * PAGE_BYTES, lambda region: region not in walls) == regions[3:6]
    )


def test_the_lower_of_two_equal_holes_is_used_again_first() -> None:
    allocator = Allocator(5 * PAGE_BYTES)
    regions = [take(allocator, PAGE_BYTES) for _ in range(5)]
    allocator.free(regions[3])
    allocator.free(regions[1])
    assert allocator.allocate(1) == Region(PAGE_BYTES, 1)


def test_memory_that_was_used_before_is_taken_before_memory_that_never_was() -> None:
    allocator = Allocator(100 * PAGE_BYTES)
    first = allocator.allocate(10 * PAGE_BYTES)
    allocator.allocate(10 * PAGE_BYTES)
    assert first
    allocator.free(first)
    assert allocator.allocate(4 * PAGE_BYTES) == Region(0, 4 * PAGE_BYTES)


@pytest.mark.parametrize("region", [Region(0, 5), Region(4096, 10), Region(0, 4096)])
def test_what_is_not_allocated_cannot_be_freed(region: Region) -> None:
    allocator = Allocator(4 * PAGE_BYTES)
    allocator.allocate(10)
    with pytest.raises(ValueError, match="is not allocated"):
        allocator.free(region)


def test_a_region_cannot_be_freed_twice() -> None:
    allocator = Allocator(4 * PAGE_BYTES)
    region = allocator.allocate(10)
    assert region
    allocator.free(region)
    with pytest.raises(ValueError, match="is not allocated"):
        allocator.free(region)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_cannot_be_allocated(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"cannot allocate {nbytes} bytes"):
        Allocator(4 * PAGE_BYTES).allocate(nbytes)
