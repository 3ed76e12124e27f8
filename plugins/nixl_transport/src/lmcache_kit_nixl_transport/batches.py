"""How regions are cut and grouped into transfers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmcache_kit.interfaces.memory import Region
from lmcache_kit_nixl_transport.agent import Copy

BATCH_BYTES = 8 << 20
"""Small regions go together until they are this many: a transfer of its own costs each 15 us."""

PIECE_BYTES = 32 << 20
"""The most of one region in a transfer: by CMA nothing interrupts one, and others wait for it."""


class Batch(NamedTuple):
    """One transfer: its copies, and the number of the region that each is a piece of."""

    numbers: list[int]
    copies: list[Copy]


def plan(
    into: Sequence[Region], base: int, offered: Sequence[Region], their_base: int
) -> Iterator[Batch]:
    """Transfers that fill ``into``, in its order. Empty regions are in none."""
    batch, batch_bytes = Batch([], []), 0
    for number, (mine, theirs) in enumerate(zip(into, offered, strict=True)):
        local, remote = base + mine.offset, their_base + theirs.offset
        left = mine.nbytes
        while left:
            nbytes = left if left < PIECE_BYTES else PIECE_BYTES
            if batch_bytes and batch_bytes + nbytes > BATCH_BYTES:
                yield batch
                batch, batch_bytes = Batch([], []), 0
            batch.numbers.append(number)
            batch.copies.append(Copy(local, remote, nbytes))
            batch_bytes += nbytes
            local, remote, left = local + nbytes, remote + nbytes, left - nbytes
    if batch_bytes:
        yield batch


def pieces_of(region: Region) -> int:
    return -(-region.nbytes // PIECE_BYTES)
