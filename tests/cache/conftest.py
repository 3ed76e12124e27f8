from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import pytest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.interfaces import EvictionPolicy, MemoryBackend, Region, Usage
from tests.cache.stores import Cache, Dict, MakeCache


class FakeMemory(MemoryBackend):
    """A backend as simple as can be: first fit over single bytes, every question a full scan."""

    def __init__(self, capacity_bytes: int) -> None:
        self._bytes = bytearray(capacity_bytes)
        self._regions: list[Region] = []
        self._fd = os.memfd_create("fake")
        self.closed = False

    @property
    def fd(self) -> int:
        return self._fd

    def _free_runs(self) -> list[Region]:
        runs, at = [], 0
        for region in [*sorted(self._regions), Region(len(self._bytes), 0)]:
            if region.offset > at:
                runs.append(Region(at, region.offset - at))
            at = region.offset + region.nbytes
        return runs

    def allocate(self, nbytes: int) -> Region | None:
        for run in self._free_runs():
            if run.nbytes >= nbytes:
                region = Region(run.offset, nbytes)
                self._regions.append(region)
                return region
        return None

    def free(self, region: Region) -> None:
        self._regions.remove(region)

    def eviction_plan(
        self, nbytes: int, evictable: Callable[[Region], bool]
    ) -> Iterable[Region] | None:
        best: tuple[int, list[Region]] | None = None
        for start in range(len(self._bytes) - nbytes + 1):
            inside = [
                region
                for region in self._regions
                if region.offset < start + nbytes and region.offset + region.nbytes > start
            ]
            cost = sum(region.nbytes for region in inside)
            if all(evictable(region) for region in inside) and (best is None or cost < best[0]):
                best = (cost, inside)
        return best[1] if best else None

    @property
    def memory(self) -> memoryview:
        return memoryview(self._bytes)

    def view(self, region: Region) -> memoryview:
        return memoryview(self._bytes)[region.offset : region.offset + region.nbytes]

    def usage(self) -> Usage:
        held = sum(region.nbytes for region in self._regions)
        return Usage(
            capacity_bytes=len(self._bytes),
            requested_bytes=held,
            allocated_bytes=held,
            regions=len(self._regions),
            largest_free_bytes=max((run.nbytes for run in self._free_runs()), default=0),
        )

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake_memory() -> type[FakeMemory]:
    return FakeMemory


@pytest.fixture
def make_engine(clock: Clock) -> Iterator[Callable[..., CacheEngine]]:
    """Engines over a fake memory of so many bytes."""
    made: list[CacheEngine] = []

    def make(capacity_bytes: int = 1000, policy: EvictionPolicy | None = None) -> CacheEngine:
        engine = CacheEngine(
            FakeMemory(capacity_bytes),
            policy or LRU(),
            location="Fake",
            lease_ttl_s=100,
            clock=clock,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def make(make_engine: Callable[..., object], clock: Clock) -> Iterator[MakeCache]:
    """Caches with tiers below memory."""
    made: list[Cache] = []

    def make(*stores: Dict, memory: int = 1000) -> Cache:
        made.append(Cache(make_engine, *stores, memory=memory, clock=clock))
        return made[-1]

    yield make
    for cache in made:
        for store in cache.stores:
            store.gate.set()
        cache.close()
