"""The backend ``LocalCPUBackend``."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable

from lmcache_kit.errors import BackendError, ConfigError
from lmcache_kit.interfaces import MemoryBackend, Region, Usage
from lmcache_kit_cpu_backend.allocator import PAGE_BYTES, Allocator
from lmcache_kit_cpu_backend.memory_limits import Available, available_memory
from lmcache_kit_cpu_backend.prefault import Prefault

_GIB = 1 << 30
# The size can never change again: no client that maps the memory can truncate it and so make the
# accesses of another client fail.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class LocalCPUBackend(MemoryBackend):
    """KV cache in one memfd, which takes pages from the system as the memory is used.

    ``capacity_bytes`` is rounded down to whole pages of 4 KiB. Raises ConfigError for a capacity
    that is smaller than a page, and BackendError for one that is larger than the memory that is
    available now.
    """

    def __init__(self, capacity_bytes: int) -> None:
        _check_capacity(capacity_bytes, available_memory())
        self._allocator = Allocator(capacity_bytes)
        self._fd = os.memfd_create("lmcache-kit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self._allocator.capacity_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, self._allocator.capacity_bytes)
        except OSError as error:
            os.close(self._fd)
            raise BackendError(
                f"max_local_cpu_size: the system refuses {_gib(capacity_bytes)} of shared memory "
                f"({error.strerror})",
                hint="Set a smaller max_local_cpu_size",
            ) from error
        self._memory = memoryview(self._map)
        self._prefault = Prefault(self._map)

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def memory(self) -> memoryview:
        return self._memory

    def allocate(self, nbytes: int) -> Region | None:
        self._check_open()
        region = self._allocator.allocate(nbytes)
        if region is not None:
            self._prefault.used_up_to(region.offset + region.nbytes)
        return region

    def free(self, region: Region) -> None:
        self._allocator.free(region)

    def eviction_plan(
        self, nbytes: int, evictable: Callable[[Region], bool]
    ) -> list[Region] | None:
        return self._allocator.eviction_plan(nbytes, evictable)

    def view(self, region: Region) -> memoryview:
        self._check_open()
        if region not in self._allocator:
            raise ValueError(f"{region} is not allocated")
        return self._memory[region.offset : region.offset + region.nbytes]

    def usage(self) -> Usage:
        held = self._allocator
        return Usage(
            capacity_bytes=held.capacity_bytes,
            requested_bytes=held.requested_bytes,
            allocated_bytes=held.allocated_bytes,
            regions=len(held),
            largest_free_bytes=held.largest_free_bytes,
        )

    def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self._prefault.close()
        self._memory.release()
        with contextlib.suppress(BufferError):  # a view still exists; its end frees the memory
            self._map.close()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ValueError("the backend is closed")


def _check_capacity(capacity_bytes: int, available: Available | None) -> None:
    if capacity_bytes < PAGE_BYTES:
        raise ConfigError(
            f"max_local_cpu_size is {capacity_bytes} bytes; the smallest is {PAGE_BYTES}",
            hint="Set max_local_cpu_size to the size of the cache in GiB",
        )
    if available is not None and capacity_bytes > available.nbytes:
        raise BackendError(
            f"max_local_cpu_size is {_gib(capacity_bytes)}; this machine has "
            f"{_gib(available.nbytes)} available ({available.source})",
            hint=f"Set max_local_cpu_size to {available.nbytes / _GIB * 0.8:.1f} or less, or free "
            "memory",
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB"
