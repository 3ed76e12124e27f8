"""The cache engine."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING

from lmcache_kit.cache import checks
from lmcache_kit.cache.counters import COUNTERS
from lmcache_kit.cache.entries import Body, Form, Part, Space
from lmcache_kit.cache.leases import Leases
from lmcache_kit.cache.lookups import Lookups, Search
from lmcache_kit.cache.packing import Packer, Recoded
from lmcache_kit.cache.pins import Pins
from lmcache_kit.cache.records import (
    ChangeListener,
    Grant,
    Match,
    Selected,
    StoredChunk,
    StoreItem,
)
from lmcache_kit.cache.shelf import Shelf
from lmcache_kit.cache.stores import Stores
from lmcache_kit.cache.unpacking import Unpacker
from lmcache_kit.keys import ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.interfaces import Codec, EvictionPolicy, MemoryBackend
    from lmcache_kit.interfaces.operations import PinInfo

MAX_LOADERS = 4


class CacheEngine:
    """What is stored where, who reads or writes it, and what leaves when room is needed.

    A library without sockets: whoever serves it names the *owner* of each lookup and store, and
    says when an owner has died. Thread-safe; listeners are called under the lock. It takes the
    backend over, and closes it.

    A chunk has one payload per rank and is found once all ranks have committed theirs. Memory for
    all ranks is set aside with the first one, so that a chunk that one rank stores fits for all.

    >>> from lmcache_kit.cache.engine import CacheEngine
    >>> from lmcache_kit.cache.eviction import LRU
    >>> from lmcache_kit.cache.records import StoreItem
    >>> from lmcache_kit.keys import pack_tokens
    >>> from lmcache_kit_cpu_backend.backend import LocalCPUBackend
    >>> engine = CacheEngine(LocalCPUBackend(1 << 20), LRU(), location="LocalCPUBackend")
    >>> space, tokens = bytes(32), pack_tokens([5, 6, 7])
    >>> [grant] = engine.allocate(space, 0, 1, 256, [StoreItem(space[:16], tokens, 300)], "me")
    >>> engine.commit([(grant.ticket, 0)], "me")
    1
    >>> match = engine.lookup(space, pack_tokens([5, 6, 8]), 256, 1, "me")
    >>> match.chunks[0].usable
    2
    >>> engine.release(match.lease, rank=0)
    True
    >>> engine.close()
    """

    def __init__(
        self,
        backend: MemoryBackend,
        policy: EvictionPolicy,
        *,
        location: str,
        lease_ttl_s: float = 120.0,
        max_pinned_share: float = 0.5,
        loaders: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.location = location
        self._lock = threading.RLock()
        self._clock = clock
        self._ttl_s = lease_ttl_s
        self._shelf = Shelf(backend, policy)
        self._leases = Leases(lease_ttl_s, clock)
        self._pins = Pins(int(self._shelf.capacity_bytes * max_pinned_share), clock)
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._stores = Stores(self._shelf, self._counters, clock)
        self._loaders = loaders or ThreadPoolExecutor(
            min(MAX_LOADERS, len(os.sched_getaffinity(0))), thread_name_prefix="lmcache-kit-load"
        )
        unpacker = Unpacker(self._shelf, self._counters, self._lock, self._loaders)
        self._lookups = Lookups(self._shelf, self._leases, unpacker, self._counters)
        self._packer = Packer(self._shelf, self._pins, unpacker, self._counters, self._lock)
        self._closed = False

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

    # Reading.

    def lookup(  # noqa: PLR0917 - what is wanted, by whom: one fact each
        self,
        namespace: bytes,
        tokens: bytes,
        chunk_size: int,
        world_size: int,
        owner: Hashable,
        wait_s: float = 0.0,
    ) -> Match:
        """Find and lease the longest stored prefix of packed ``tokens``.

        Of the last chunk found only the first ``usable`` tokens need match. The lease ends when
        each rank has released it, or all at once, when its owner dies, or after its time. A chunk
        that is encoded is decoded for as long as it is leased; where that takes longer than
        ``wait_s``, the prefix ends.
        """
        ready = threading.Event()
        search = self.begin_lookup(namespace, tokens, chunk_size, world_size, owner, ready.set)
        if search.waiting:
            ready.wait(wait_s)
        return self.finish_lookup(search)

    def begin_lookup(  # noqa: PLR0917 - as lookup
        self,
        namespace: bytes,
        tokens: bytes,
        chunk_size: int,
        world_size: int,
        owner: Hashable,
        on_ready: Callable[[], None],
    ) -> Search:
        """Do what :meth:`lookup` does before it waits, which it must if ``waiting`` is not 0.
        ``on_ready`` is called then, from any thread; but not to wait for it is allowed, too."""
        checks.check_shape(namespace, chunk_size, world_size)
        checks.check_lookup(tokens)
        with self._lock:
            space = self._shelf.space(namespace, chunk_size, world_size)
            return self._lookups.begin(space, tokens, owner, on_ready)

    def finish_lookup(self, search: Search) -> Match:
        """Do the rest, once."""
        with self._lock:
            return self._lookups.finish(search)

    def release(self, lease: int, rank: int | None) -> bool:
        """One rank is done with a lease, or all are (None). False when it did not hold it."""
        with self._lock:
            bodies = self._leases.release(lease, rank)
            self._settle(bodies or ())
            return bodies is not None

    def drop_corrupt(self, key: ChunkKey) -> bool:
        """Forget a chunk whose bytes are not what was stored. False when it is not here."""
        with self._lock:
            entry = self._shelf.entries.get(key)
            if entry is None or not entry.complete:
                return False
            self._counters["corrupt_total"] += 1
            self._shelf.unlink(entry)
            return True

    # Writing.

    def allocate(  # noqa: PLR0917 - what is stored, by whom: one fact each
        self,
        namespace: bytes,
        rank: int,
        world_size: int,
        chunk_size: int,
        items: Sequence[StoreItem],
        owner: Hashable,
        form: Form | None = None,
    ) -> list[Grant]:
        """Memory for one rank's payloads of some chunks; one grant per item, in order.

        ``present``: it is stored, or this rank's part of it is being stored. ``refused``: it is
        larger than the whole memory, or too much of that is in use; so is all that follows it
        in this batch. Only ranks that say what their payloads are, as ``form``, can have them
        encoded.
        """
        checks.check_shape(namespace, chunk_size, world_size)
        checks.check_store(items, rank, world_size, chunk_size)
        with self._lock:
            self._expire_holds()
            space = self._shelf.space(namespace, chunk_size, world_size)
            space = space or Space(namespace, chunk_size, world_size)
            if form is not None:
                space.forms[rank] = form
            return self._stores.allocate(space, rank, items, owner)

    def commit(self, written: Sequence[tuple[int, int]], owner: Hashable) -> int:
        """The payloads of these ``(ticket, checksum)`` are written. Returns how many counted."""
        checks.check_written(written)
        with self._lock:
            return sum([self._stores.commit(*pair, owner) for pair in written])

    def abandon(self, tickets: Sequence[int], owner: Hashable) -> int:
        """These will not be written, so what other ranks wrote of these chunks goes too."""
        with self._lock:
            return sum([self._stores.abandon(ticket, owner) for ticket in tickets])

    # What operators ask for. ``namespaces`` are digests, None for all; ``tokens`` are packed, and
    # mean the chunks of their longest stored prefix, or with None all chunks.

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
            cleared = _selected([Part(entry, entry.tokens) for entry in gone if entry.complete])
            for entry in gone:
                self._shelf.unlink(entry)
            self._counters["cleared_chunks_total"] += cleared.chunks
            return cleared, _selected([Part(entry, entry.tokens) for entry in kept])

    def keys(
        self, namespaces: Collection[bytes] | None, tokens: bytes | None
    ) -> list[tuple[ChunkKey, int]]:
        """Chunks, and how many tokens of each are meant."""
        with self._lock:
            parts = self._shelf.select(namespaces, tokens)
            return [(part.entry.key, part.tokens) for part in parts]

    def pack(self, key: ChunkKey, method: str, codec: Codec) -> Recoded:
        """Encode a chunk with ``codec``, in the calling thread. Until that is verified the raw
        bytes serve, and those who read them keep them until they are done."""
        return self._packer.pack(key, method, codec)

    def unpack(self, key: ChunkKey, method: str) -> Recoded:
        """Decode a chunk that ``method`` has encoded, in the calling thread."""
        return self._packer.unpack(key, method)

    # The end of things.

    def drop_owner(self, owner: Hashable) -> None:
        """An owner has died: its leases end, and what it was storing goes."""
        with self._lock:
            self._settle(self._leases.release_owner(owner))
            self._stores.abandon_owner(owner)

    def expire(self) -> int:
        """End leases that have outlived their time; returns how many.

        So do pins. Chunks that some rank stored and another never began to, for as long, go too.
        """
        with self._lock:
            ended = self._expire_holds()
            self._stores.expire(self._clock() - self._ttl_s)
            return ended

    def stats(self) -> dict[str, float]:
        """Counters, whose names end in ``_total``, and gauges."""
        with self._lock:
            usage = self._shelf.memory.usage()
            pending = len(self._shelf.pending)
            return {
                **self._counters,
                "chunks": len(self._shelf.entries) - pending,
                "pending": pending,
                "encoded_chunks": self._shelf.encoded,
                "leases": len(self._leases),
                "writers": len(self._stores),
                "pins": len(self._pins),
                "pinned_bytes": self._pins.pinned_bytes,
                "namespaces": len(self._shelf.spaces),
                "capacity_bytes": usage.capacity_bytes,
                "requested_bytes": usage.requested_bytes,
                "allocated_bytes": usage.allocated_bytes,
                "largest_free_bytes": usage.largest_free_bytes,
                "external_fragmentation": usage.external_fragmentation,
            }

    def close(self) -> None:
        """Forget everything and close the backend; waits for what is being decoded. Safe to call
        twice."""
        self._loaders.shutdown(cancel_futures=True)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._shelf.listeners.clear()
                for entry in list(self._shelf.entries.values()):
                    self._shelf.unlink(entry)
                self._shelf.memory.close()

    def _expire_holds(self) -> int:
        self._counters["expired_pins_total"] += self._pins.expire()
        ended, bodies = self._leases.release_expired()
        self._counters["expired_leases_total"] += ended
        self._settle(bodies)
        return ended

    def _settle(self, bodies: Sequence[Body]) -> None:
        for body in bodies:
            self._shelf.settle(body)


def _selected(parts: Sequence[Part]) -> Selected:
    return Selected(
        tokens=sum([part.tokens for part in parts]),
        chunks=len(parts),
        nbytes=sum([part.entry.nbytes for part in parts]),
    )
