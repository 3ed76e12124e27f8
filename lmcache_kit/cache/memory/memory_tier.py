"""The memory tier: what workers read and write directly."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor

from lmcache_kit.cache.index.entries import NamespaceState, RankLayout
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.memory.decoding import Decoder
from lmcache_kit.cache.memory.memory_index import MemoryIndex
from lmcache_kit.cache.memory.pending_stores import PendingStores
from lmcache_kit.cache.memory.transcoding import Transcoder
from lmcache_kit.cache.memory.transfers import Transfers
from lmcache_kit.cache.metrics import MEMORY
from lmcache_kit.cache.records import Grant, StoreItem, Transcoded
from lmcache_kit.cache.tier import Tier
from lmcache_kit.interfaces import EvictionPolicy, MemoryBackend
from lmcache_kit.interfaces.codec import Codec
from lmcache_kit.keys import ChunkKey


class MemoryTier(Tier):
    """The chunks in ``backend``, which the tier owns and closes. ``loaders`` decode."""

    def __init__(  # noqa: PLR0917 - the parts of a tier
        self,
        backend: MemoryBackend,
        policy: EvictionPolicy,
        location: str,
        lease_ttl_s: float,
        max_pinned_share: float,
        loaders: Executor,
        clock: Callable[[], float],
    ) -> None:
        index = MemoryIndex(backend, policy)
        state: TierState[MemoryIndex] = TierState(
            location,
            index,
            metrics=MEMORY,
            pin_budget_bytes=int(index.capacity_bytes * max_pinned_share),
            clock=clock,
            lease_ttl_s=lease_ttl_s,
        )
        super().__init__(state)
        self.state = state
        self.backend = backend
        self.decoder = Decoder(state, loaders)
        self.stores = PendingStores(state)
        self.transfers = Transfers(state)
        self._transcoder = Transcoder(state, self.decoder)
        self._closed = False

    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier.Tier`. Readers of the raw bytes keep these until
        they are done."""
        return self._transcoder.encode(key, method, codec)

    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier.Tier`."""
        return self._transcoder.decode(key, method)

    def allocate(  # noqa: PLR0917 - one fact each
        self,
        namespace: bytes,
        rank: int,
        world_size: int,
        chunk_size: int,
        items: Sequence[StoreItem],
        owner: Hashable,
        rank_layout: RankLayout | None,
    ) -> list[Grant]:
        """Reserve memory for one rank's payloads; see the engine."""
        with self._lock:
            self.state.expire_holds()
            known = self.state.index.namespace(namespace, chunk_size, world_size)
            known = known or NamespaceState(namespace, chunk_size, world_size)
            if rank_layout is not None:
                known.rank_layouts[rank] = rank_layout
            return self.stores.allocate(known, rank, items, owner)

    def release(self, lease: int, rank: int | None) -> bool:
        """End one rank's part of a lease, or all of it (None). False when it was not held."""
        with self._lock:
            return self.state.leases.release(lease, rank)

    @property
    def version(self) -> int:
        """A number that grows when a store ends, a hold is released or memory is freed."""
        return self.state.version

    def wait_for_change(self, version: int, timeout_s: float) -> bool:
        """Wait until :attr:`version` is another than ``version``, which was read before.

        False after ``timeout_s`` seconds.
        """
        return self.state.wait_for(lambda: self.state.version != version, timeout_s)

    def wait_until_stored(self, keys: Sequence[ChunkKey], timeout_s: float) -> bool:
        """Wait until none of these chunks is being stored. False after ``timeout_s`` seconds."""
        pending = self.state.index.pending
        return self.state.wait_for(lambda: not any(key in pending for key in keys), timeout_s)

    def drop_corrupt(self, key: ChunkKey) -> bool:
        """Delete a chunk whose bytes a reader found to be wrong. False when it is not here."""
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is None or not entry.complete:
                return False
            self._counters["corrupt_total"] += 1
            self._index.unlink(entry)
            return True

    def drop_owner(self, owner: Hashable) -> None:
        """End the leases of an owner that has died, and give its stores up."""
        with self._lock:
            self.state.leases.release_owner(owner)
            self.stores.abandon_owner(owner)

    def expire(self) -> int:
        """End what has outlived its time; returns how many leases did."""
        with self._lock:
            ended = self.state.expire_holds()
            self.stores.expire(self.state.clock() - self.state.lease_ttl_s)
            return ended

    def stats(self) -> dict[str, float]:
        """Return counters, whose names end in ``_total``, and gauges."""
        with self._lock:
            index, usage = self.state.index, self.backend.usage()
            pending = len(index.pending)
            return {
                **self._counters,
                "chunks": len(index.entries) - pending,
                "pending": pending,
                "encoded_chunks": index.encoded,
                "leases": len(self.state.leases),
                "writers": len(self.stores),
                "pins": len(self._pins),
                "pinned_bytes": self._pins.pinned_bytes,
                "namespaces": len(index.namespaces),
                "capacity_bytes": usage.capacity_bytes,
                "requested_bytes": usage.requested_bytes,
                "allocated_bytes": usage.allocated_bytes,
                "largest_free_bytes": usage.largest_free_bytes,
                "external_fragmentation": usage.external_fragmentation,
            }

    def close(self) -> None:
        """Drop all chunks and close the backend. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._index.listeners.clear()
                for entry in list(self._index.entries.values()):
                    self._index.unlink(entry)
                self.backend.close()
