"""The suite of memory backends."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest

from lmcache_kit.interfaces import MemoryBackend, Region
from lmcache_kit.testing._model import CheckedMemory, random_steps
from lmcache_kit.testing.suite import Suite

MakeMemory: TypeAlias = Callable[[int], MemoryBackend]

MIB = 1 << 20
_EIGHTH = MIB // 8


class MemoryBackendSuite(Suite):
    """Conformance of a :class:`~lmcache_kit.interfaces.MemoryBackend`.

    Define the fixture ``make_memory``: a function from ``capacity_bytes`` to a new backend. The
    suite asks for 1 MiB or more, and closes the backends.
    """

    @pytest.fixture
    def make_memory(self) -> MakeMemory:
        self.missing(
            "the fixture 'make_memory'",
            """
            @pytest.fixture
            def make_memory(self):
                return lambda capacity_bytes: MyBackend(capacity_bytes)
            """,
        )

    @pytest.fixture
    def make(self, make_memory: MakeMemory) -> Iterator[Callable[[], MemoryBackend]]:
        made: list[MemoryBackend] = []

        def build() -> MemoryBackend:
            made.append(make_memory(MIB))
            return made[-1]

        yield build
        for memory in made:
            memory.close()

    @pytest.fixture
    def memory(self, make: Callable[[], MemoryBackend]) -> MemoryBackend:
        return make()

    # Allocation.

    def test_it_is_a_memory_backend(self, memory: MemoryBackend) -> None:
        assert isinstance(memory, MemoryBackend)

    def test_a_new_one_is_empty(self, memory: MemoryBackend) -> None:
        usage = memory.usage()
        assert (usage.requested_bytes, usage.allocated_bytes, usage.regions) == (0, 0, 0)
        assert 0 < usage.capacity_bytes <= MIB, "its capacity is larger than requested"
        assert usage.largest_free_bytes == usage.capacity_bytes

    @pytest.mark.parametrize("nbytes", [1, 2, 4095, 4096, 4097, 100_001])
    def test_a_region_is_as_long_as_asked(self, memory: MemoryBackend, nbytes: int) -> None:
        region = memory.allocate(nbytes)
        assert region is not None
        assert region.nbytes == nbytes == len(memory.view(region))
        assert 0 <= region.offset <= len(memory.memory) - nbytes

    def test_all_of_the_memory_can_be_one_region(self, memory: MemoryBackend) -> None:
        capacity = memory.usage().capacity_bytes
        assert memory.allocate(capacity) == Region(0, capacity)
        assert memory.allocate(1) is None
        assert memory.usage().largest_free_bytes == 0

    @pytest.mark.parametrize("more", [1, MIB, 1 << 60])
    def test_more_than_there_is_cannot_be_had(self, memory: MemoryBackend, more: int) -> None:
        before = memory.usage()
        assert memory.allocate(before.capacity_bytes + more) is None
        assert memory.usage() == before

    @pytest.mark.parametrize("nbytes", [0, -1])
    def test_less_than_a_byte_cannot_be_had(self, memory: MemoryBackend, nbytes: int) -> None:
        try:
            region = memory.allocate(nbytes)
        except ValueError:
            region = None
        assert region is None
        assert memory.usage().regions == 0

    def test_any_history_is_exact(self, make: Callable[[], MemoryBackend]) -> None:
        """Compare any sequence of steps with a naive model.

        Regions do not overlap, accounting is exact, usage() predicts which allocations succeed, and
        all holes have merged at the end.
        """
        from hypothesis import given, settings
        from hypothesis import strategies as st

        sizes = st.one_of(st.integers(1, 9000), st.integers(1, MIB))
        steps = st.lists(st.tuples(st.booleans(), sizes, st.integers(0, 1 << 16)), max_size=40)

        @settings(max_examples=60, deadline=None, database=None)
        @given(steps=steps)
        def holds(steps: list[tuple[bool, int, int]]) -> None:
            with CheckedMemory(make()) as checked:
                for allocate, nbytes, which in steps:
                    checked.step(allocate=allocate, nbytes=nbytes, which=which)

        holds()

    def test_a_long_history_is_exact(self, memory: MemoryBackend) -> None:
        with CheckedMemory(memory) as checked:
            random_steps(checked, random.Random(0), count=1000)

    def test_holes_merge(self, memory: MemoryBackend) -> None:
        regions = self._fill(memory)
        for region in [*regions[::2], *regions[1::2]]:
            memory.free(region)
        capacity = memory.usage().capacity_bytes
        assert memory.usage().largest_free_bytes == capacity
        assert memory.allocate(capacity) is not None

    def test_usage_is_honest_about_fragments(self, memory: MemoryBackend) -> None:
        for region in self._fill(memory)[::2]:
            memory.free(region)
        largest = memory.usage().largest_free_bytes
        assert memory.allocate(largest + 1) is None
        assert memory.allocate(largest) is not None

    # Freeing.

    def test_a_region_that_is_not_allocated_cannot_be_freed(self, memory: MemoryBackend) -> None:
        region, other = memory.allocate(5000), memory.allocate(5000)
        assert region is not None
        assert other is not None
        memory.free(other)
        before = memory.usage()
        for foreign in (
            other,
            Region(region.offset, region.nbytes - 1),
            Region(region.offset, region.nbytes + 1),
            Region(region.offset + 1, region.nbytes),
            Region(region.offset - 1, region.nbytes),
            Region(MIB * 8, 100),
        ):
            with pytest.raises(ValueError):  # noqa: PT011 - any message will do
                memory.free(foreign)
            assert memory.usage() == before, f"freeing {foreign} failed and changed something"
        memory.free(region)

    # Eviction plans.

    @pytest.mark.parametrize("seed", range(12))
    def test_eviction_plan_makes_room_whenever_it_can_be_made(
        self, make: Callable[[], MemoryBackend], seed: int
    ) -> None:
        """None means that freeing all evictable regions would not be enough."""
        draw = random.Random(seed)
        memory, evictable = self._scattered(make(), draw), set[Region]()
        with memory:
            evictable |= {region for region in memory.live if draw.random() < 0.7}
            wanted = draw.choice([5000, 2 * _EIGHTH, 3 * _EIGHTH, 5 * _EIGHTH])
            before = memory.backend.usage()
            named = memory.backend.eviction_plan(wanted, evictable.__contains__)
            leave = evictable if named is None else set(named)
            assert leave <= evictable, "it names regions that are not evictable or not allocated"
            assert memory.backend.usage() == before, "eviction_plan() changed something"
            for region in leave:
                memory.free(region)
            made = memory.backend.allocate(wanted)
            assert (made is None) == (named is None), f"named {named}, and then got {made}"

    @pytest.mark.parametrize("seed", range(4))
    def test_eviction_plan_names_nothing_in_vain(
        self, make: Callable[[], MemoryBackend], seed: int
    ) -> None:
        def scattered() -> CheckedMemory:
            return self._scattered(make(), random.Random(seed))

        wanted = 3 * _EIGHTH
        with scattered() as memory:
            named = list(memory.backend.eviction_plan(wanted, lambda _: True) or ())
        for kept in named:
            with scattered() as memory:
                for region in named:
                    if region != kept:
                        memory.free(region)
                assert memory.backend.allocate(wanted) is None, f"{kept} need not have gone"

    def test_eviction_plan_of_what_fits_already_names_nothing(self, memory: MemoryBackend) -> None:
        memory.allocate(_EIGHTH)
        named = memory.eviction_plan(_EIGHTH, lambda _: True)
        assert named is not None
        assert list(named) == []

    def test_eviction_plan_of_more_than_there_is_is_none(self, memory: MemoryBackend) -> None:
        self._fill(memory)
        assert memory.eviction_plan(memory.usage().capacity_bytes + 1, lambda _: True) is None
        assert memory.eviction_plan(_EIGHTH, lambda _: False) is None

    # The bytes.

    def test_memory_is_all_of_it_and_stays_the_same_object(self, memory: MemoryBackend) -> None:
        whole = memory.memory
        assert isinstance(whole, memoryview)
        assert whole is memory.memory
        assert (whole.nbytes, whole.readonly) == (memory.usage().capacity_bytes, False)
        assert (whole.itemsize, whole.ndim, whole.contiguous) == (1, 1, True)

    def test_views_memory_and_descriptor_show_the_same_bytes(self, memory: MemoryBackend) -> None:
        memory.allocate(5000)
        region = memory.allocate(6)
        assert region is not None
        at = slice(region.offset, region.offset + 6)
        with mmap.mmap(memory.fd, memory.usage().capacity_bytes) as mapped:
            memory.view(region)[:] = b"viewed"
            assert mapped[at] == bytes(memory.memory[at]) == b"viewed"
            mapped[at] = b"mapped"
            assert bytes(memory.view(region)) == bytes(memory.memory[at]) == b"mapped"
            memory.memory[at] = b"memory"
            assert mapped[at] == bytes(memory.view(region)) == b"memory"

    def test_the_descriptor_is_of_the_whole_memory(self, memory: MemoryBackend) -> None:
        assert os.fstat(memory.fd).st_size == memory.usage().capacity_bytes

    def test_two_backends_have_nothing_in_common(self, make: Callable[[], MemoryBackend]) -> None:
        one, other = make(), make()
        region = one.allocate(100)
        assert region is not None
        one.view(region)[:] = b"x" * 100
        assert other.usage().regions == 0
        assert bytes(other.memory[region.offset : region.offset + 100]) != b"x" * 100

    def test_threads_under_a_lock_do_not_disturb_each_other(self, memory: MemoryBackend) -> None:
        lock = threading.Lock()

        def work(seed: int) -> bool:
            draw, good = random.Random(seed), True
            for _ in range(200):
                with lock:
                    region = memory.allocate(draw.randrange(1, 20_000))
                if region is None:
                    continue
                memory.view(region)[:] = bytes([seed]) * region.nbytes
                good = good and bytes(memory.view(region)) == bytes([seed]) * region.nbytes
                with lock:
                    memory.free(region)
            return good

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(1, 5))), "a thread found another one's bytes"
        assert memory.usage().requested_bytes == memory.usage().regions == 0

    # The end.

    def test_closing_twice_is_fine(self, memory: MemoryBackend) -> None:
        memory.allocate(100)
        memory.close()
        memory.close()

    def test_a_closed_backend_hands_nothing_out(self, memory: MemoryBackend) -> None:
        region, fd = memory.allocate(100), memory.fd
        assert region is not None
        memory.close()
        uses: dict[str, Callable[[], Any]] = {
            "allocate": lambda: memory.allocate(1),
            "view": lambda: memory.view(region),
            "memory": lambda: memory.memory[0],
            "fd": lambda: os.fstat(fd if memory.fd == fd else memory.fd),
        }
        for name, use in uses.items():
            with pytest.raises((ValueError, OSError)):
                pytest.fail(f"{name} after close: {use()!r}")

    def test_views_may_outlive_the_backend(self, memory: MemoryBackend) -> None:
        region = memory.allocate(100)
        assert region is not None
        view = memory.view(region)
        memory.close()
        view.release()

    def test_closing_gives_everything_back(self, make_memory: MakeMemory) -> None:
        def life() -> tuple[int, int]:
            memory = make_memory(MIB)
            assert memory.allocate(5000) is not None
            memory.close()
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        first = life()
        later = [life() for _ in range(3)][-1]
        assert later <= first, f"(descriptors, threads) grew from {first} to {later}"

    # Behind it.

    def _fill(self, memory: MemoryBackend) -> list[Region]:
        found = []
        while (region := memory.allocate(_EIGHTH)) is not None:
            found.append(region)
        assert len(found) > 4, f"only {len(found)} regions of an eighth of the memory fit"
        return found

    def _scattered(self, backend: MemoryBackend, draw: random.Random) -> CheckedMemory:
        """A memory that is nearly full, with holes."""
        memory = CheckedMemory(backend)
        while memory.step(allocate=True, nbytes=draw.randrange(1000, _EIGHTH), which=0):
            pass
        for _ in range(len(memory.live) // 4):
            memory.step(allocate=False, nbytes=0, which=draw.randrange(1 << 16))
        return memory
