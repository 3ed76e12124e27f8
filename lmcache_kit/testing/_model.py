"""A memory backend compared with a naive model after every step."""

from __future__ import annotations

import random
from types import TracebackType

from lmcache_kit.interfaces import MemoryBackend, Region

_EDGE = 16


class CheckedMemory:
    """Run steps on a backend and compare it with a model after each.

    At its end, the context manager frees everything, compares once more and closes the backend.
    """

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend
        self.live: dict[Region, bytes] = {}
        self._count = 0

    def __enter__(self) -> CheckedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None and not self.backend.usage().regions > len(self.live):
            for region in list(self.live):
                self.free(region)
            usage = self.backend.usage()
            assert usage.largest_free_bytes == usage.capacity_bytes, "free holes did not merge"
        self.backend.close()

    def step(self, *, allocate: bool, nbytes: int, which: int) -> bool:
        """Allocate, or free one of the live regions; return whether the step succeeded."""
        if allocate:
            return self._allocate(nbytes)
        if self.live:
            self.free(list(self.live)[which % len(self.live)])
        return bool(self.live)

    def free(self, region: Region) -> None:
        mark = self.live.pop(region)
        view = self.backend.view(region)
        edges = bytes(view[:_EDGE]), bytes(view[-_EDGE:])
        wanted = mark[: len(edges[0])], mark[: len(edges[1])]
        assert edges == wanted, f"{region} was overwritten while it was allocated"
        self.backend.free(region)
        self._compare()

    def _allocate(self, nbytes: int) -> bool:
        fits = nbytes <= self.backend.usage().largest_free_bytes
        region = self.backend.allocate(nbytes)
        assert (region is not None) == fits, (
            f"allocate({nbytes}) returned {region}, against largest_free_bytes"
        )
        if region is None:
            self._compare()
            return False
        assert region.nbytes == nbytes, f"asked for {nbytes} bytes, got {region}"
        end = region.offset + nbytes
        assert 0 <= region.offset <= end <= self.backend.usage().capacity_bytes
        for other in self.live:
            apart = end <= other.offset or other.offset + other.nbytes <= region.offset
            assert apart, f"{region} overlaps {other}"
        self._count += 1
        mark = bytes([self._count % 255 + 1]) * _EDGE
        self.live[region] = mark
        view = self.backend.view(region)
        view[:_EDGE], view[-_EDGE:] = mark[: len(view)], mark[: len(view)]
        self._compare()
        return True

    def _compare(self) -> None:
        usage = self.backend.usage()
        requested = sum(region.nbytes for region in self.live)
        assert usage.regions == len(self.live)
        assert usage.requested_bytes == requested, "requested_bytes is not the sum of requests"
        assert requested <= usage.allocated_bytes <= usage.capacity_bytes
        assert usage.largest_free_bytes <= usage.free_bytes


def random_steps(checked: CheckedMemory, draw: random.Random, count: int) -> None:
    """Allocate and free at random: many regions, mostly small, memory nearly full."""
    for _ in range(count):
        nbytes = draw.choice([1, 100, 4096, 10_000, 50_000])
        checked.step(allocate=draw.random() < 0.55, nbytes=nbytes, which=draw.randrange(1 << 16))
