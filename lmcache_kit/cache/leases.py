"""Leases: short holds by readers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count

from lmcache_kit.cache.entries import Entry


@dataclass(slots=True)
class _Lease:
    owner: Hashable
    entries: Sequence[Entry]
    ranks: set[int]
    expires: float


class Leases:
    """Who reads what until when. Each method that ends leases returns the entries let go."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        # A number of an earlier life must not mean anything in this one.
        self._numbers = count(1 + secrets.randbits(48))
        self._leases: dict[int, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, entries: Sequence[Entry], ranks: int, owner: Hashable) -> int:
        """Hold ``entries`` until each of ``ranks`` ranks has released them."""
        for entry in entries:
            entry.leases += 1
        number = next(self._numbers)
        expires = self._clock() + self._ttl_s
        self._leases[number] = _Lease(owner, entries, set(range(ranks)), expires)
        return number

    def release(self, number: int, rank: int | None) -> Sequence[Entry] | None:
        """None when there is no such hold; an empty sequence while other ranks hold on."""
        lease = self._leases.get(number)
        if lease is None or (rank is not None and rank not in lease.ranks):
            return None
        if rank is not None:
            lease.ranks.remove(rank)
            if lease.ranks:
                return ()
        return self._end(number)

    def release_owner(self, owner: Hashable) -> list[Entry]:
        mine = [number for number, lease in self._leases.items() if lease.owner == owner]
        return [entry for number in mine for entry in self._end(number)]

    def release_expired(self) -> tuple[int, list[Entry]]:
        """How many leases have outlived their time, and what they held."""
        now = self._clock()
        late: list[int] = []
        for number, lease in self._leases.items():  # oldest first, and all live equally long
            if lease.expires > now:
                break
            late.append(number)
        return len(late), [entry for number in late for entry in self._end(number)]

    def _end(self, number: int) -> Sequence[Entry]:
        entries = self._leases.pop(number).entries
        for entry in entries:
            entry.leases -= 1
        return entries
