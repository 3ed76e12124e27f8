"""Contract of memory backends, the first tier."""

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
    """Usage of a memory backend, in bytes.

    ``requested_bytes`` is the sum of all allocated requests, ``allocated_bytes`` the same with the
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

    The engine decides which chunk is in which region, for how long, and what to evict; the backend
    owns the bytes. Methods are called under the engine's lock, and must not block on anything but
    memory.

    A configuration names the class by ``memory_backend``. It is built with ``capacity_bytes``, and
    with an instance of its ``config`` model as well when the configuration has options for it. It
    raises :class:`~lmcache_kit.errors.BackendError` when the machine has no such memory now: vLLM
    serves without a cache then, and the kit tries again later.

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
        """The whole memory, writable; the same object until the backend is closed."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Region | None:
        """Allocate ``nbytes`` (at least 1), or return None when no free run is large enough."""

    @abstractmethod
    def free(self, region: Region) -> None:
        """Free a region. Raises ValueError for one that is not allocated."""

    @abstractmethod
    def eviction_plan(
        self, nbytes: int, evictable: Callable[[Region], bool]
    ) -> Iterable[Region] | None:
        """Return the cheapest set of regions to free so that ``allocate(nbytes)`` succeeds.

        The set holds only regions for which ``evictable`` is true. Return None only if there is no
        such set. The engine asks before it evicts anything, so that no chunk is evicted in vain. It
        asks again when eviction in policy order has freed enough bytes, and no hole is large
        enough; this bounds fragmentation.
        """

    @abstractmethod
    def view(self, region: Region) -> memoryview:
        """Return the region's bytes, writable, valid until the region is freed or on close."""

    @abstractmethod
    def usage(self) -> Usage:
        """Return the usage now; exact at all times."""

    @abstractmethod
    def close(self) -> None:
        """Return all memory to the system. Safe to call twice."""
