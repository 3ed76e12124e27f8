"""What operators can do with the chunks of one location, whatever it keeps them in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult, NamespaceInfo
from lmcache_kit.cache.index.entries import PartialChunk
from lmcache_kit.cache.index.pins import Pins
from lmcache_kit.cache.index.references import References
from lmcache_kit.cache.records import ChangeListener, Selected, StoredChunk

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import ChunkIndex
    from lmcache_kit.cache.memory.transcoding import Transcoded
    from lmcache_kit.interfaces import Codec
    from lmcache_kit.interfaces.operations import PinInfo
    from lmcache_kit.keys import ChunkKey


class Tier(ABC):
    """The chunks at one location: those in memory, or those of a tier below it. Thread-safe;
    listeners are called under the lock.

    ``references`` keep what moves need. ``namespaces`` are digests, None for all; ``tokens`` are
    packed, and mean the chunks of their longest stored prefix, or with None all chunks.
    """

    def __init__(  # noqa: PLR0917 - what its subclasses share
        self,
        location: str,
        index: ChunkIndex,
        pin_budget_bytes: int,
        counters: Counter[str],
        lock: AbstractContextManager[object],
        clock: Callable[[], float],
    ) -> None:
        self.location = location
        self.references = References(index, lock)
        self._index = index
        self._pins = Pins(pin_budget_bytes, clock)
        self._counters = counters
        self._lock = lock
        self._clock = clock

    # What the control plane follows.

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]:
        """All complete chunks; ``listener`` hears of every change after that."""
        with self._lock:
            self._index.listeners.append(listener)
            return self._index.records()

    def unsubscribe(self, listener: ChangeListener) -> None:
        with self._lock:
            self._index.listeners.remove(listener)

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None:
        """Call ``receive`` with all complete chunks while nothing can change."""
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
        """Keep chunks until :meth:`unpin`, or for ``ttl_s``: what there is, and what of that is
        pinned now, the first chunks that fit into the budget. A pin of the same id ends.

        Raises ValueError when there are too many pins.
        """
        with self._lock:
            self._expire_holds()
            there = self._index.select(namespaces, tokens)
            return _selected(there), _selected(self._pins.add(pin_id, owner, ttl_s, there))

    def unpin(
        self,
        namespaces: Collection[bytes] | None,
        tokens: bytes | None,
        pin_id: str | None = None,
    ) -> Selected:
        """End the pin of this id; without one, the pins that hold nothing but first tokens of
        ``tokens``, or all. Returns what they held."""
        with self._lock:
            self._expire_holds()
            within = self._pins.within(namespaces, tokens)
            return _selected(self._pins.remove(within if pin_id is None else [pin_id]))

    def pins(self) -> list[PinInfo]:
        """All pins, the oldest first."""
        with self._lock:
            self._expire_holds()
            return self._pins.infos(self.location)

    @property
    def pin_budget_bytes(self) -> int:
        """What all pinned chunks may weigh."""
        return self._pins.budget_bytes

    def clear(
        self,
        namespaces: Collection[bytes] | None = None,
        tokens: bytes | None = None,
        *,
        force: bool = False,
    ) -> tuple[Selected, Selected]:
        """Forget chunks: those that went, and those that stay because they are pinned, unless
        ``force``. Memory in use is freed when it is released.

        Of ``tokens``, a chunk goes when it holds only these, or also what follows the last of
        them; not one that goes on otherwise. Without tokens, stores under way are given up too.
        """
        with self._lock:
            self._expire_holds()
            if tokens is None:
                there = [partial.entry for partial in self._index.select(namespaces, None)]
                there += self._index.pending.values() if namespaces is None else ()
            else:
                there = self._index.holding(namespaces, tokens)
            gone = [entry for entry in there if force or not entry.pins]
            kept = [entry for entry in there if entry.pins and not force]
            cleared = _selected(
                [PartialChunk(entry, entry.tokens) for entry in gone if entry.complete]
            )
            for entry in gone:
                self._index.unlink(entry)
            self._counters["cleared_chunks_total"] += cleared.chunks
            return cleared, _selected([PartialChunk(entry, entry.tokens) for entry in kept])

    def contains(self, key: ChunkKey) -> bool:
        """Whether a chunk is here, as far as is known."""
        entry = self._index.entries.get(key)
        return entry is not None and entry.complete

    def keys(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[tuple[ChunkKey, int]]:
        """Chunks, and how many tokens of each are meant."""
        with self._lock:
            partial_chunks = self._index.select(namespaces, tokens)
            return [(partial.entry.key, partial.tokens) for partial in partial_chunks]

    @abstractmethod
    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """Encode a chunk with ``codec``, in the calling thread. Until that is verified the raw
        bytes serve."""

    @abstractmethod
    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """Decode a chunk that ``method`` has encoded, in the calling thread."""

    # What moves ask for.

    def chunk_refs(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[ChunkRef]:
        """The longest stored prefix of packed ``tokens``, or everything: each chunk after the one
        that it follows."""
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
        """What is known of these namespaces, as far as they have chunks here."""
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
        """Forget chunks that another cache holds now. Pinned ones stay, and so do those that
        other chunks here still follow, because these could not be found without them."""
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

    def _expire_holds(self) -> int:
        """End pins, and what else has outlived its time; returns how many leases did."""
        self._counters["expired_pins_total"] += self._pins.expire()
        return 0


def _selected(partial_chunks: Sequence[PartialChunk]) -> Selected:
    return Selected(
        tokens=sum([partial.tokens for partial in partial_chunks]),
        chunks=len(partial_chunks),
        nbytes=sum([partial.entry.nbytes for partial in partial_chunks]),
    )
