"""Grouping of regions into transfers: small regions together, large regions in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmcache_kit.interfaces.memory import Region
from lmcache_kit_nixl_transport.agent import Copy

BATCH_BYTES = 8 << 20
"""Small regions share a transfer of up to this size, since each transfer costs 15 us."""

PART_BYTES = 32 << 20
"""Most bytes of one region in a transfer: over CMA a transfer blocks, and other reads wait."""


class Batch(NamedTuple):
    """One transfer: its copies, and for each copy the number of its region."""

    numbers: list[int]
    copies: list[Copy]


def plan_batches(
    into: Sequence[Region], base: int, offered: Sequence[Region], remote_base: int
) -> Iterator[Batch]:
    """Yield the transfers that fill ``into``, in order. Empty regions are in none.

    ``base`` and ``remote_base`` are the addresses of this process's memory and the peer's.
    """
    batch, batch_bytes = Batch([], []), 0
    for number, (local_region, remote_region) in enumerate(zip(into, offered, strict=True)):
        local, remote = base + local_region.offset, remote_base + remote_region.offset
        left = local_region.nbytes
        while left:
            nbytes = left if left < PART_BYTES else PART_BYTES
            if batch_bytes and batch_bytes + nbytes > BATCH_BYTES:
                yield batch
                batch, batch_bytes = Batch([], []), 0
            batch.numbers.append(number)
            batch.copies.append(Copy(local, remote, nbytes))
            batch_bytes += nbytes
            local, remote, left = local + nbytes, remote + nbytes, left - nbytes
    if batch_bytes:
        yield batch


def part_count(region: Region) -> int:
    """Return the number of copies that fill the region."""
    return -(-region.nbytes // PART_BYTES)
