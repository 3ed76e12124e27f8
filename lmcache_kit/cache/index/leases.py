"""Leases: short holds by readers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count

from lmcache_kit.cache.index.entries import Payload


@dataclass(slots=True)
class _Lease:
    owner: Hashable
    payloads: Sequence[Payload]
    ranks: set[int]
    expires: float


class Leases:
    """Who reads what until when. Each method that ends leases returns the payloads let go."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        # A number of an earlier life must not mean anything in this one.
        self._numbers = count(1 + secrets.randbits(48))
        self._leases: dict[int, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, payloads: Sequence[Payload], ranks: int, owner: Hashable) -> int:
        """Hold ``payloads`` until each of ``ranks`` ranks has released them."""
        for payload in payloads:
            payload.ref_count += 1
        number = next(self._numbers)
        expires = self._clock() + self._ttl_s
        self._leases[number] = _Lease(owner, payloads, set(range(ranks)), expires)
        return number

    def release(self, number: int, rank: int | None) -> Sequence[Payload] | None:
        """None when there is no such hold; an empty sequence while other ranks hold on."""
        lease = self._leases.get(number)
        if lease is None or (rank is not None and rank not in lease.ranks):
            return None
        if rank is not None:
            lease.ranks.remove(rank)
            if lease.ranks:
                return ()
        return self._end(number)

    def cut(self, number: int, first: int) -> Sequence[Payload] | None:
        """Let go all but the ``first`` so many payloads; None when there is no such hold."""
        lease = self._leases.get(number)
        if lease is None or not first:
            return None if lease is None else self._end(number)
        gone, lease.payloads = lease.payloads[first:], lease.payloads[:first]
        for payload in gone:
            payload.ref_count -= 1
        return gone

    def release_owner(self, owner: Hashable) -> list[Payload]:
        mine = [number for number, lease in self._leases.items() if lease.owner == owner]
        return [payload for number in mine for payload in self._end(number)]

    def release_expired(self) -> tuple[int, list[Payload]]:
        """How many leases have outlived their time, and what they held."""
        now = self._clock()
        late: list[int] = []
        for number, lease in self._leases.items():  # oldest first, and all live equally long
            if lease.expires > now:
                break
            late.append(number)
        return len(late), [payload for number in late for payload in self._end(number)]

    def _end(self, number: int) -> Sequence[Payload]:
        payloads = self._leases.pop(number).payloads
        for payload in payloads:
            payload.ref_count -= 1
        return payloads
