"""A tier: the chunks at one location, as operators, moves and the control plane see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult, NamespaceInfo
from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.entries import Entry, PartialChunk
from lmcache_kit.cache.index.holds import References
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.records import ChangeListener, Selected, StoredChunk, Transcoded
from lmcache_kit.interfaces.codec import Codec
from lmcache_kit.interfaces.operations import PinInfo
from lmcache_kit.keys import ChunkKey


class Tier(ABC):
    """The chunks at one location, in memory or in a store. Thread-safe.

    ``namespaces`` are digests, None for all. ``tokens`` are packed; they select the chunks of their
    longest stored prefix, and None selects all chunks. Listeners are called under the lock.
    """

    def __init__(self, state: TierState[ChunkIndex]) -> None:
        self._state = state
        self._index = state.index
        self._pins = state.pins
        self._counters = state.counters
        self._lock = state.lock

    @property
    def location(self) -> str:
        """The name by which operators address the tier."""
        return self._state.location

    @property
    def references(self) -> References:
        """Holds for moves and lookups."""
        return self._state.references

    # What the control plane follows.

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]:
        """Return all complete chunks, and tell ``listener`` of every change after that."""
        with self._lock:
            self._index.listeners.append(listener)
            return self._index.records()

    def unsubscribe(self, listener: ChangeListener) -> None:
        """Stop telling ``listener``. Raises ValueError if it is not subscribed."""
        with self._lock:
            self._index.listeners.remove(listener)

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None:
        """Call ``receive`` with all complete chunks, under the lock."""
        with self._lock:
            receive(self._index.records())

    # What operators ask for.

    def pin(
        self,
        namespaces: Collection[bytes] | None,
        tokens: bytes | None,
        pin_id: str,
        *,
        owner: str = "",
        ttl_s: float | None = None,
    ) -> tuple[Selected, Selected]:
        """Pin chunks until :meth:`unpin`, or for ``ttl_s`` seconds. An earlier pin of this id ends.

        Returns the selected chunks, and those of them that are pinned now: the first ones that fit
        into the budget. Raises ValueError when there are too many pins.
        """
        with self._lock:
            self._state.expire_holds()
            there = self._index.select(namespaces, tokens)
            return _selected(there), _selected(self._pins.add(pin_id, owner, ttl_s, there))

    def unpin(
        self,
        namespaces: Collection[bytes] | None,
        tokens: bytes | None,
        pin_id: str | None = None,
    ) -> Selected:
        """End the pin of this id; without one, the pins that lie within ``tokens``, or all.

        Returns the chunks that were pinned.
        """
        with self._lock:
            self._state.expire_holds()
            within = self._pins.within(namespaces, tokens)
            return _selected(self._pins.remove(within if pin_id is None else [pin_id]))

    def pins(self) -> list[PinInfo]:
        """Return all pins, the oldest first."""
        with self._lock:
            self._state.expire_holds()
            return self._pins.infos(self.location)

    @property
    def pin_budget_bytes(self) -> int:
        """The bytes that all pinned chunks together may have."""
        return self._pins.budget_bytes

    def clear(
        self,
        namespaces: Collection[bytes] | None = None,
        tokens: bytes | None = None,
        *,
        force: bool = False,
    ) -> tuple[Selected, Selected]:
        """Delete chunks; returns those deleted, and those that stay because they are pinned.

        ``force`` deletes pinned ones, too. Memory in use is freed when its last hold ends. Of
        ``tokens``, a chunk is deleted if it has only these, or the last of these and then others.
        No chunk is left behind that a lookup could not reach any more: chunks that follow a deleted
        one are deleted with it, pending stores are given up with it, and chunks that a pinned one
        follows stay with that.
        """
        with self._lock:
            self._state.expire_holds()
            if tokens is None:
                meant = [partial.entry for partial in self._index.select(namespaces, None)]
                meant += [
                    entry
                    for entry in self._index.pending.values()
                    if namespaces is None or entry.namespace.digest in namespaces
                ]
            else:
                meant = self._index.covered_by(namespaces, tokens)
            needed = set() if force else self._needed_by_pins(meant)
            gone = [entry for entry in meant if entry.key not in needed]
            kept = [entry for entry in meant if entry.key in needed and entry.complete]
            gone += self._index.followers_of(gone)
            cleared = _selected(
                [PartialChunk(entry, entry.tokens) for entry in gone if entry.complete]
            )
            for entry in gone:
                self._index.unlink(entry)
            self._counters["cleared_chunks_total"] += cleared.chunks
            return cleared, _selected([PartialChunk(entry, entry.tokens) for entry in kept])

    def _needed_by_pins(self, meant: Sequence[Entry]) -> set[ChunkKey]:
        """Return those of these chunks, and of what follows them, that are pinned or lead to one
        that is."""
        entries = {entry.key: entry for entry in meant}
        entries |= {entry.key: entry for entry in self._index.followers_of(meant)}
        needed: set[ChunkKey] = set()
        for entry in entries.values():
            at: Entry | None = entry if entry.pins else None
            while at is not None and at.key not in needed:
                needed.add(at.key)
                at = entries.get(at.parent)
        return needed

    def contains(self, key: ChunkKey) -> bool:
        """Whether the index has a chunk."""
        entry = self._index.entries.get(key)
        return entry is not None and entry.complete

    def keys(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[tuple[ChunkKey, int]]:
        """Return the selected chunks, and how many tokens of each."""
        with self._lock:
            partial_chunks = self._index.select(namespaces, tokens)
            return [(partial.entry.key, partial.tokens) for partial in partial_chunks]

    @abstractmethod
    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """Encode a chunk with ``codec``, in the calling thread. The raw bytes serve until then."""

    @abstractmethod
    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """Decode a chunk that ``method`` has encoded, in the calling thread."""

    # What moves ask for.

    def chunk_refs(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[ChunkRef]:
        """Return the selected chunks, parents before their children."""
        with self._lock:
            partial_chunks = self._index.select(namespaces, tokens)
            partial_chunks.sort(key=lambda partial: partial.entry.start)
            return [
                ChunkRef(
                    partial.entry.key,
                    partial.entry.namespace.digest,
                    partial.tokens,
                    partial.entry.nbytes,
                )
                for partial in partial_chunks
            ]

    def namespaces(self, digests: Collection[bytes]) -> list[NamespaceInfo]:
        """Describe those of these namespaces that have chunks here."""
        with self._lock:
            found = [
                self._index.namespaces[each] for each in digests if each in self._index.namespaces
            ]
            return [
                NamespaceInfo(
                    namespace.digest,
                    namespace.chunk_size,
                    namespace.world_size,
                    tuple(sorted(namespace.rank_layouts.items())),
                )
                for namespace in found
            ]

    def delete(self, keys: Collection[ChunkKey]) -> DeleteResult:
        """Delete chunks that another cache holds now.

        Pinned and referenced ones stay. So do those that other chunks here follow: these could not
        be found without them.
        """
        with self._lock:
            wanted = {key: self._index.entries[key] for key in keys if key in self._index.entries}
            pinned = [entry for entry in wanted.values() if entry.pins]
            in_use = [e for e in wanted.values() if not e.pins and (e.ref_count or not e.complete)]
            free = {
                entry.key: entry
                for entry in wanted.values()
                if not entry.pins and not entry.ref_count and entry.complete
            }
            ends = [entry for entry in free.values() if not self._index.followers(entry.key)]
            gone = 0
            while ends:
                entry = ends.pop()
                self._counters["moved_out_chunks_total"] += 1
                self._counters["moved_out_bytes_total"] += entry.nbytes
                self._index.unlink(entry)
                gone += 1
                parent = free.get(entry.parent)
                if parent is not None and not self._index.followers(parent.key):
                    ends.append(parent)
            return DeleteResult(gone, len(pinned), len(free) - gone, len(in_use))


def _selected(partial_chunks: Sequence[PartialChunk]) -> Selected:
    return Selected(
        tokens=sum([partial.tokens for partial in partial_chunks]),
        chunks=len(partial_chunks),
        nbytes=sum([partial.entry.nbytes for partial in partial_chunks]),
    )
