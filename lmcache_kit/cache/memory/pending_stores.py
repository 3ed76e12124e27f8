"""Stores under way: memory is granted, then written and committed, or given up."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from lmcache_kit.cache.index.entries import Entry, NamespaceState, Payload, big_endian
from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.cache.records import Grant, StoreItem
from lmcache_kit.keys import ChunkKey, chunk_key

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import MemoryIndex


class _Ticket(NamedTuple):
    entry: Entry
    rank: int
    owner: Hashable


@dataclass(slots=True)
class _Batch:
    """Whose stores, the room made for them, and why what was refused so far was, by key."""

    namespace: NamespaceState
    rank: int
    owner: Hashable
    evictor: Evictor
    refused: dict[ChunkKey, str] = field(default_factory=dict)


class PendingStores:
    """The tickets of one index. Counts what happens in ``counters``."""

    def __init__(
        self, index: MemoryIndex, counters: Counter[str], clock: Callable[[], float]
    ) -> None:
        self._index = index
        self._counters = counters
        self._clock = clock
        # A number of an earlier life must not mean anything in this one.
        self._numbers = count(1 + secrets.randbits(48))
        self._tickets: dict[int, _Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def allocate(
        self, namespace: NamespaceState, rank: int, items: Sequence[StoreItem], owner: Hashable
    ) -> list[Grant]:
        keys = [chunk_key(namespace.digest, item.parent, item.tokens) for item in items]
        keep = {*keys, *(item.parent for item in items)}
        wanted_bytes = sum(item.nbytes for item in items) * namespace.world_size
        evictor = Evictor(self._index, self._counters, keep, wanted_bytes)
        batch = _Batch(namespace, rank, owner, evictor)
        return [self._grant(batch, key, item) for key, item in zip(keys, items, strict=True)]

    def commit(self, number: int, checksum: int, owner: Hashable) -> bool:
        """False when there is no such ticket, or its chunk was given up meanwhile."""
        ticket = self._take_ticket(number, owner)
        if ticket is None:
            return False
        entry = ticket.entry
        if not entry.linked:
            self._index.release_if_unused(entry.payload)
            return False
        entry.checksums[ticket.rank] = checksum
        entry.since = self._clock()
        if len(entry.checksums) == entry.namespace.world_size:
            entry.mark_complete()
            self._index.complete(entry)
            self._counters["stored_chunks_total"] += 1
            self._counters["stored_bytes_total"] += entry.nbytes
        return True

    def abandon(self, number: int, owner: Hashable) -> bool:
        """Give up a chunk; what other ranks wrote of it goes too."""
        ticket = self._take_ticket(number, owner)
        if ticket is None:
            return False
        self._counters["abandoned_total"] += 1
        self._index.unlink(ticket.entry)
        self._index.release_if_unused(ticket.entry.payload)
        return True

    def abandon_owner(self, owner: Hashable) -> None:
        mine = [number for number, ticket in self._tickets.items() if ticket.owner == owner]
        for number in mine:
            self.abandon(number, owner)

    def expire(self, stale: float) -> None:
        """Give up chunks that nobody has written to since ``stale``: some rank stored its part
        and another one never began. A rank that does write is waited for, because the memory
        is its own until it says so or dies."""
        for entry in list(self._index.pending.values()):
            if not entry.payload.ref_count and entry.since <= stale:
                self._counters["expired_pending_total"] += 1
                self._index.unlink(entry)

    def _grant(self, batch: _Batch, key: ChunkKey, item: StoreItem) -> Grant:
        entry = self._index.entries.get(key)
        if entry and (entry.complete or batch.rank in entry.claimed):
            return Grant("present")
        refusal = batch.refused.get(item.parent, "")
        if item.nbytes * batch.namespace.world_size > self._index.capacity_bytes:
            refusal = "too_large"
        elif not refusal:
            entry = self._set_aside(batch, key, item, entry)
            refusal = "" if entry else "full"
        if refusal or entry is None:
            self._refuse(batch, key, refusal)
            return Grant("refused")
        entry.claimed.add(batch.rank)
        entry.payload.ref_count += 1
        entry.since = self._clock()
        number = next(self._numbers)
        self._tickets[number] = _Ticket(entry, batch.rank, batch.owner)
        return Grant("granted", number, entry.payload.regions[batch.rank].offset)

    def _set_aside(
        self, batch: _Batch, key: ChunkKey, item: StoreItem, entry: Entry | None
    ) -> Entry | None:
        """The entry with memory for this rank's payload, or None when there is no room."""
        if entry is None:
            regions = batch.evictor.take_all([item.nbytes] * batch.namespace.world_size)
            if not regions:
                return None
            sort_key = big_endian(item.tokens)
            payload = Payload(regions)
            entry = Entry(
                key, item.parent, batch.namespace, sort_key, item.start, payload, self._clock()
            )
            self._index.put(entry)
        elif entry.payload.regions[batch.rank].nbytes != item.nbytes:
            regions = batch.evictor.take_all([item.nbytes])
            if not regions:
                return None
            self._index.replace_region(entry, batch.rank, regions[0])
        return entry

    def _refuse(self, batch: _Batch, key: ChunkKey, refusal: str) -> None:
        batch.refused[key] = refusal
        self._counters[f"refused_{refusal}_total"] += 1
        entry = self._index.entries.get(key)
        if entry is not None:  # other ranks have begun to store what can now not be complete
            self._index.unlink(entry)

    def _take_ticket(self, number: int, owner: Hashable) -> _Ticket | None:
        ticket = self._tickets.get(number)
        if ticket is None or ticket.owner != owner:
            return None
        del self._tickets[number]
        ticket.entry.payload.ref_count -= 1
        return ticket
