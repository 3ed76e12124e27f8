"""The first tier: memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec


class Region(NamedTuple):
    """A run of bytes in a backend's memory: ``[offset, offset + nbytes)``."""

    offset: int
    nbytes: int


class Usage(msgspec.Struct, frozen=True):
    """What a memory backend holds, in bytes.

    ``requested_bytes`` is the sum of what was asked for, ``allocated_bytes`` the same with the
    allocator's rounding; ``allocated_bytes <= capacity_bytes`` always. ``largest_free_bytes`` is
    the largest request that would succeed now.
    """

    capacity_bytes: int
    requested_bytes: int
    allocated_bytes: int
    regions: int
    largest_free_bytes: int

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.allocated_bytes

    @property
    def external_fragmentation(self) -> float:
        """Share of the free memory that the largest request could not use, 0 to 1."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0


class MemoryBackend(ABC):
    """The first tier: one span of memory that workers map, and an allocator over it.

    The engine owns what lies where, for how long, and what to evict; the backend owns the bytes.
    Methods are called under the engine's lock and must not block on anything but memory.

    >>> from lmcache_kit_cpu_backend.backend import LocalCPUBackend
    >>> memory = LocalCPUBackend(capacity_bytes=1 << 20)
    >>> region = memory.allocate(1000)
    >>> memory.view(region)[:5] = b"hello"
    >>> bytes(memory.view(region)[:5])
    b'hello'
    >>> memory.free(region)
    >>> memory.usage().allocated_bytes
    0
    >>> memory.close()
    """

    @property
    @abstractmethod
    def fd(self) -> int:
        """File descriptor of the memory, of ``usage().capacity_bytes`` bytes, for mmap(2)."""

    @property
    @abstractmethod
    def memory(self) -> memoryview:
        """All of the memory, writable, the same object until the backend is closed."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Region | None:
        """Take ``nbytes`` (at least 1), or return None when no free run is large enough."""

    @abstractmethod
    def free(self, region: Region) -> None:
        """Give a region back. Raises ValueError for one that is not allocated."""

    @abstractmethod
    def eviction_plan(
        self, nbytes: int, evictable: Callable[[Region], bool]
    ) -> Iterable[Region] | None:
        """Regions whose release lets ``allocate(nbytes)`` succeed, with as few bytes as can be.

        Only regions for which ``evictable`` is true may be named. None only when there is no such
        set: the engine asks before it evicts anything, so that nothing is lost in vain, and again
        when eviction in policy order has freed enough bytes in all and none of the holes is large
        enough; this bounds fragmentation.
        """

    @abstractmethod
    def view(self, region: Region) -> memoryview:
        """The region's bytes, writable, valid until it is freed or the backend is closed."""

    @abstractmethod
    def usage(self) -> Usage:
        """What is held now; exact at all times."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back to the system. Safe to call twice."""
