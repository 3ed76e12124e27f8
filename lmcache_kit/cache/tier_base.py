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

    ``anchors`` keep what moves need. ``namespaces`` are digests, None for all; ``tokens`` are
    packed, and mean the chunks of their longest stored prefix, or with None all chunks.
    """

    def __init__(  # noqa: PLR0917 - what its subclasses share
        self,
        location: str,
        shelf: ChunkIndex,
        pin_budget_bytes: int,
        counters: Counter[str],
        lock: AbstractContextManager[object],
        clock: Callable[[], float],
    ) -> None:
        self.location = location
        self.anchors = References(shelf, lock)
        self._shelf = shelf
        self._pins = Pins(pin_budget_bytes, clock)
        self._counters = counters
        self._lock = lock
        self._clock = clock

    # What the control plane follows.

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]:
        """All complete chunks; ``listener`` hears of every change after that."""
        with self._lock:
            self._shelf.listeners.append(listener)
            return self._shelf.records()

    def unsubscribe(self, listener: ChangeListener) -> None:
        with self._lock:
            self._shelf.listeners.remove(listener)

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None:
        """Call ``receive`` with all complete chunks while nothing can change."""
        with self._lock:
            receive(self._shelf.records())

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
            there = self._shelf.select(namespaces, tokens)
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
                there = [part.entry for part in self._shelf.select(namespaces, None)]
                there += self._shelf.pending.values() if namespaces is None else ()
            else:
                there = self._shelf.holding(namespaces, tokens)
            gone = [entry for entry in there if force or not entry.pins]
            kept = [entry for entry in there if entry.pins and not force]
            cleared = _selected(
                [PartialChunk(entry, entry.tokens) for entry in gone if entry.complete]
            )
            for entry in gone:
                self._shelf.unlink(entry)
            self._counters["cleared_chunks_total"] += cleared.chunks
            return cleared, _selected([PartialChunk(entry, entry.tokens) for entry in kept])

    def holds(self, key: ChunkKey) -> bool:
        """Whether a chunk is here, as far as is known."""
        entry = self._shelf.entries.get(key)
        return entry is not None and entry.complete

    def keys(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[tuple[ChunkKey, int]]:
        """Chunks, and how many tokens of each are meant."""
        with self._lock:
            parts = self._shelf.select(namespaces, tokens)
            return [(part.entry.key, part.tokens) for part in parts]

    @abstractmethod
    def pack(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """Encode a chunk with ``codec``, in the calling thread. Until that is verified the raw
        bytes serve."""

    @abstractmethod
    def unpack(self, key: ChunkKey, method: str) -> Transcoded:
        """Decode a chunk that ``method`` has encoded, in the calling thread."""

    # What moves ask for.

    def holdings(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[ChunkRef]:
        """The longest stored prefix of packed ``tokens``, or everything: each chunk after the one
        that it follows."""
        with self._lock:
            parts = self._shelf.select(namespaces, tokens)
            parts.sort(key=lambda part: part.entry.start)
            return [
                ChunkRef(part.entry.key, part.entry.space.digest, part.tokens, part.entry.nbytes)
                for part in parts
            ]

    def spaces(self, digests: Collection[bytes]) -> list[NamespaceInfo]:
        """What is known of these namespaces, as far as they have chunks here."""
        with self._lock:
            found = [self._shelf.spaces[each] for each in digests if each in self._shelf.spaces]
            return [
                NamespaceInfo(
                    space.digest,
                    space.chunk_size,
                    space.world_size,
                    tuple(sorted(space.forms.items())),
                )
                for space in found
            ]

    def forget(self, keys: Collection[ChunkKey]) -> DeleteResult:
        """Forget chunks that another cache holds now. Pinned ones stay, and so do those that
        other chunks here still follow, because these could not be found without them."""
        with self._lock:
            wanted = {key: self._shelf.entries[key] for key in keys if key in self._shelf.entries}
            pinned = [entry for entry in wanted.values() if entry.pins]
            in_use = [e for e in wanted.values() if not e.pins and (e.anchors or not e.complete)]
            free = {
                entry.key: entry
                for entry in wanted.values()
                if not entry.pins and not entry.anchors and entry.complete
            }
            ends = [entry for entry in free.values() if not self._shelf.followers(entry.key)]
            gone = 0
            while ends:
                entry = ends.pop()
                self._counters["moved_out_chunks_total"] += 1
                self._counters["moved_out_bytes_total"] += entry.nbytes
                self._shelf.unlink(entry)
                gone += 1
                parent = free.get(entry.parent)
                if parent is not None and not self._shelf.followers(parent.key):
                    ends.append(parent)
            return DeleteResult(gone, len(pinned), len(free) - gone, len(in_use))

    def _expire_holds(self) -> int:
        """End pins, and what else has outlived its time; returns how many leases did."""
        self._counters["expired_pins_total"] += self._pins.expire()
        return 0


def _selected(parts: Sequence[PartialChunk]) -> Selected:
    return Selected(
        tokens=sum([part.tokens for part in parts]),
        chunks=len(parts),
        nbytes=sum([part.entry.nbytes for part in parts]),
    )
