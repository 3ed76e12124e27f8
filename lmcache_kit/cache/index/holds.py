"""Holds: who keeps which chunks in place, and until when.

Three kinds share one table. A *lease* keeps payloads for a reader or a peer, a *pin* keeps chunks
for an operator, and a *reference* keeps chunks for one move or one lookup. A count in the payload
or the entry tells the evictor whether any hold of that kind is left.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.entries import Entry, PartialChunk, Payload, big_endian
from lmcache_kit.interfaces.operations import PinInfo
from lmcache_kit.keys import TOKEN_BYTES, ChunkKey

MAX_PINS = 1 << 14
_Id = TypeVar("_Id", bound=Hashable)
_Item = TypeVar("_Item")


@dataclass(slots=True)
class Hold(Generic[_Item]):
    """``items`` that ``owner`` keeps until ``expires``, or without a limit (None)."""

    owner: Hashable
    items: Sequence[_Item]
    expires: float | None


class HoldTable(Generic[_Id, _Item]):
    """The holds of one kind, by id, the oldest first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._holds: dict[_Id, Hold[_Item]] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def add(
        self, hold_id: _Id, owner: Hashable, items: Sequence[_Item], ttl_s: float | None
    ) -> None:
        """Enter a hold that lives for ``ttl_s`` seconds."""
        expires = None if ttl_s is None else self._clock() + ttl_s
        self._holds[hold_id] = Hold(owner, items, expires)

    def get(self, hold_id: _Id) -> Hold[_Item] | None:
        return self._holds.get(hold_id)

    def pop(self, hold_id: _Id) -> Hold[_Item] | None:
        return self._holds.pop(hold_id, None)

    def items(self) -> Iterable[tuple[_Id, Hold[_Item]]]:
        return self._holds.items()

    def of_owner(self, owner: Hashable) -> list[_Id]:
        return [hold_id for hold_id, hold in self._holds.items() if hold.owner == owner]

    def expired(self, *, equal_ttl: bool) -> list[_Id]:
        """Ids of holds whose time is over. With ``equal_ttl`` the first live one ends the scan."""
        now = self._clock()
        late: list[_Id] = []
        for hold_id, hold in self._holds.items():
            if hold.expires is not None and hold.expires <= now:
                late.append(hold_id)
            elif equal_ttl:
                break
        return late

    def left_s(self, hold: Hold[_Item]) -> float | None:
        """Seconds until a hold ends; None without a limit."""
        return None if hold.expires is None else max(0.0, hold.expires - self._clock())


class Leases:
    """Short holds of payloads by readers and peers. Called under the tier's lock.

    A payload whose last lease ends is freed if no entry consists of it any more.
    """

    def __init__(self, index: ChunkIndex, ttl_s: float, clock: Callable[[], float]) -> None:
        self._index = index
        self._ttl_s = ttl_s
        self._table: HoldTable[int, Payload] = HoldTable(clock)
        self._ranks: dict[int, set[int]] = {}
        # A number of an earlier incarnation must not name a lease of this one.
        self._numbers = count(1 + secrets.randbits(48))

    def __len__(self) -> int:
        return len(self._table)

    def grant(self, payloads: Sequence[Payload], ranks: int, owner: Hashable) -> int:
        """Hold ``payloads`` until each of ``ranks`` ranks has released the lease."""
        for payload in payloads:
            payload.ref_count += 1
        number = next(self._numbers)
        self._table.add(number, owner, payloads, self._ttl_s)
        self._ranks[number] = set(range(ranks))
        return number

    def release(self, number: int, rank: int | None) -> bool:
        """End one rank's part of a lease, or all of it (None). False when it was not held."""
        ranks = self._ranks.get(number)
        if ranks is None or (rank is not None and rank not in ranks):
            return False
        if rank is not None:
            ranks.remove(rank)
            if ranks:
                return True
        self._end(number)
        return True

    def keep_first(self, number: int, length: int) -> bool:
        """Release all but the first ``length`` payloads. False when there is no such lease."""
        lease = self._table.get(number)
        if lease is None:
            return False
        if not length:
            self._end(number)
            return True
        gone, lease.items = lease.items[length:], lease.items[:length]
        self._drop(gone)
        return True

    def release_owner(self, owner: Hashable) -> None:
        for number in self._table.of_owner(owner):
            self._end(number)

    def expire(self) -> int:
        """End the leases whose time is over; returns how many."""
        late = self._table.expired(equal_ttl=True)
        for number in late:
            self._end(number)
        return len(late)

    def _end(self, number: int) -> None:
        del self._ranks[number]
        lease = self._table.pop(number)
        if lease is not None:
            self._drop(lease.items)

    def _drop(self, payloads: Sequence[Payload]) -> None:
        for payload in payloads:
            payload.ref_count -= 1
            self._index.release_if_unused(payload)
        self._index.notify()


class Pins:
    """Long holds of chunks by operators, under ids of their choice. Called under the tier's lock.

    The pinned chunks together never have more than ``budget_bytes``.
    """

    def __init__(self, index: ChunkIndex, budget_bytes: int, clock: Callable[[], float]) -> None:
        self.budget_bytes = budget_bytes
        self._index = index
        self._table: HoldTable[str, PartialChunk] = HoldTable(clock)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of all pinned chunks, each counted once."""
        entries = {
            id(each.entry): each.entry for _, pin in self._table.items() for each in _left(pin)
        }
        return sum(entry.nbytes for entry in entries.values())

    def fits(self, entry: Entry, nbytes: int) -> bool:
        """Whether an entry may come to have ``nbytes`` bytes."""
        growth = nbytes - entry.nbytes
        return not entry.pins or self.pinned_bytes + growth <= self.budget_bytes

    def add(
        self, pin_id: str, owner: str, ttl_s: float | None, chunks: Sequence[PartialChunk]
    ) -> list[PartialChunk]:
        """Pin as many of ``chunks`` as fit, in order; an earlier pin of this id ends.

        Raises ValueError when there are too many pins.
        """
        self.remove([pin_id])
        if len(self._table) >= MAX_PINS:
            raise ValueError(f"there are {MAX_PINS} pins already; unpin some")
        left_bytes = self.budget_bytes - self.pinned_bytes
        pinned: list[PartialChunk] = []
        for chunk in chunks:
            cost_bytes = 0 if chunk.entry.pins else chunk.entry.nbytes
            if cost_bytes > left_bytes:
                break
            left_bytes -= cost_bytes
            chunk.entry.pins += 1
            pinned.append(chunk)
        if pinned:
            self._table.add(pin_id, owner, pinned, ttl_s)
        return pinned

    def remove(self, pin_ids: Iterable[str]) -> list[PartialChunk]:
        """End these pins; returns the chunks that they held, each once."""
        freed: dict[int, PartialChunk] = {}
        for pin_id in pin_ids:
            pin = self._table.pop(pin_id)
            for chunk in pin.items if pin else ():
                chunk.entry.pins -= 1
                before = freed.get(id(chunk.entry))
                if chunk.entry.linked and (before is None or before.tokens < chunk.tokens):
                    freed[id(chunk.entry)] = chunk
        if freed:
            self._index.notify()
        return list(freed.values())

    def within(self, digests: Collection[bytes] | None, tokens: bytes | None) -> list[str]:
        """Return the ids of the pins whose chunks all lie within a prefix.

        ``digests`` are namespaces and ``tokens`` packed tokens; None admits any.
        """
        sort_key = None if tokens is None else big_endian(tokens)
        return [pin_id for pin_id, pin in self._table.items() if _is_within(pin, digests, sort_key)]

    def expire(self) -> int:
        """End the pins whose time is over; returns how many."""
        late = self._table.expired(equal_ttl=False)
        self.remove(late)
        return len(late)

    def infos(self, location: str) -> list[PinInfo]:
        """Return all pins, the oldest first."""
        return [
            PinInfo(
                pin_id=pin_id,
                location=location,
                tokens=sum(chunk.tokens for chunk in _left(pin)),
                chunks=len(_left(pin)),
                nbytes=sum(chunk.entry.nbytes for chunk in _left(pin)),
                owner=str(pin.owner),
                expires_in_s=self._table.left_s(pin),
            )
            for pin_id, pin in self._table.items()
        ]


class References:
    """Holds of chunks by moves and lookups under way, one hold for each *owner*. Thread-safe.

    A chunk that is referenced is neither evicted nor deleted.
    """

    def __init__(self, index: ChunkIndex, lock: AbstractContextManager[object]) -> None:
        self._index = index
        self._lock = lock
        self._entries: defaultdict[Hashable, dict[ChunkKey, Entry]] = defaultdict(dict)

    def acquire(self, keys: Iterable[ChunkKey], owner: Hashable) -> list[ChunkKey]:
        """Reference those of these chunks that are complete; returns the other keys."""
        with self._lock:
            missing = []
            for key in keys:
                entry = self._index.entries.get(key)
                if entry is not None and entry.complete:
                    self.acquire_entry(entry, owner)
                else:
                    missing.append(key)
            return missing

    def acquire_entry(self, entry: Entry, owner: Hashable) -> None:
        """Reference one entry. Called under the lock."""
        if entry.key not in self._entries[owner]:
            self._entries[owner][entry.key] = entry
            entry.ref_count += 1

    def findable(self, owner: Hashable, wanted: Iterable[ChunkKey]) -> list[ChunkKey]:
        """Return the keys of ``wanted`` whose chunks ``owner`` references and a lookup can reach.

        ``wanted`` names parents before their children. A chunk behind a missing one is left out.
        """
        with self._lock:
            here, found, lacking = self._entries[owner], list[ChunkKey](), set[ChunkKey]()
            for key in wanted:
                entry = here.get(key)
                if entry is None or not entry.linked or entry.parent in lacking:
                    lacking.add(key)
                else:
                    found.append(key)
            return found

    def release(self, owner: Hashable) -> None:
        """Drop all references of an owner. Safe to call twice."""
        with self._lock:
            for entry in self._entries.pop(owner, {}).values():
                entry.ref_count -= 1
            self._index.notify()


def _left(pin: Hold[PartialChunk]) -> list[PartialChunk]:
    """Return the chunks that are still stored: corrupt and force-cleared ones are gone."""
    return [chunk for chunk in pin.items if chunk.entry.linked]


def _is_within(
    pin: Hold[PartialChunk], digests: Collection[bytes] | None, sort_key: bytes | None
) -> bool:
    prefixes: dict[bytes, bytes] = {}
    for entry, tokens in pin.items:
        prefix = prefixes.get(entry.namespace.digest, b"")
        prefixes[entry.namespace.digest] = prefix + entry.sort_key[: tokens * TOKEN_BYTES]
    return all(
        (digests is None or digest in digests) and (sort_key is None or sort_key.startswith(prefix))
        for digest, prefix in prefixes.items()
    )
