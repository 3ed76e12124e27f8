"""Promotion: chunks of store tiers come back into memory, for lookups and for moves."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from lmcache_kit.cache.index.chunk_index import Walk
from lmcache_kit.cache.memory.memory_tier import MemoryTier
from lmcache_kit.cache.memory.transfers import GetCodec, Transfers
from lmcache_kit.cache.records import Query
from lmcache_kit.cache.tiers.blob_store import BlobStore
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.cache.tiers.tier_reader import PromotionTarget, TierReader
from lmcache_kit.errors import BackendError
from lmcache_kit.keys import TOKEN_BYTES, ChunkKey

MAX_THREADS = 4
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Promotion:
    """The promotion of what follows a match in memory.

    It goes on after the chunk ``parent``, which ends before the token ``start``; of the next chunk
    memory has ``usable`` tokens. ``store`` is the one at work; ``promoted`` counts chunks.

    States: ``running`` until all that can be had has come (``complete``), the lookup's time is up
    (``expired``), its owner has died (``orphaned``), or the cache closes (``closed``). ``on_end``
    is called under the lock, unless the promotion expired.
    """

    query: Query
    owner: Hashable
    on_end: Callable[[Promotion], None]
    start: int = 0
    parent: ChunkKey = b""
    usable: int = 0
    state: Literal["running", "complete", "expired", "orphaned", "closed"] = "running"
    store: BlobStore | None = None
    promoted: int = 0

    @property
    def running(self) -> bool:
        return self.state == "running"


class Promotions:
    """Promotes from ``tiers`` into ``memory``, asking the tiers in order."""

    def __init__(self, tiers: Sequence[StoreTier], memory: MemoryTier, get_codec: GetCodec) -> None:
        self._stores = [tier.store for tier in tiers]
        self._state = memory.state
        transfers = Transfers(memory.state, "promoted")
        self._readers = {
            store.location: TierReader(store, memory, transfers, get_codec)
            for store in self._stores
        }
        self._active: set[Promotion] = set()
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, len(os.sched_getaffinity(0))),
            thread_name_prefix="lmcache-kit-promote",
        )

    # For lookups, under the engine's lock.

    def begin(
        self, query: Query, owner: Hashable, found: Walk, on_end: Callable[[Promotion], None]
    ) -> Promotion | None:
        """Start promoting the chunks that follow the match ``found`` in a tier. None when no tier
        may have any."""
        reached = found[-1][0].end if found else 0
        if reached * TOKEN_BYTES >= len(query.tokens):
            return None
        promotion = _after(Promotion(query, owner, on_end), found)
        if not any(_may_help(store, promotion) for store in self._stores):
            return None
        self._state.counters["promotions_total"] += 1
        # The match must not be evicted for the chunks that follow it.
        self._state.references.acquire([located.key for located, _ in found], promotion)
        self._active.add(promotion)
        self._threads.submit(self._run, promotion)
        return promotion

    def expire(self, promotion: Promotion) -> None:
        """End a promotion whose lookup does not wait any longer."""
        promotion.state = "expired"
        self._state.counters["promotions_late_total"] += 1
        self._state.notify()
        if promotion.store and not promotion.promoted:
            promotion.store.late()

    def drop_owner(self, owner: Hashable) -> None:
        """End the promotions for an owner that has died."""
        for promotion in self._active:
            if promotion.owner == owner and promotion.state != "expired":
                promotion.state = "orphaned"
        self._state.notify()

    def close(self) -> None:
        """End all promotions, and wait for the chunks at work."""
        with self._state.lock:
            for promotion in self._active:
                if promotion.running:
                    promotion.state = "closed"
            self._state.notify()
        self._threads.shutdown(cancel_futures=True)
        for reader in self._readers.values():
            reader.close()

    # For moves.

    def promote(self, store: BlobStore, keys: Sequence[ChunkKey], owner: Hashable) -> bool:
        """Have these chunks in memory, referenced by ``owner``; those that are not in the store
        (any more) are passed over. False without room for all. Raises BackendError."""
        absent = self._state.references.acquire(keys, owner)
        reader = self._readers[store.location]
        with closing(reader.fetch(absent, PromotionTarget(owner))) as coming:
            return all(
                here or not store.contains(key) for key, here in zip(absent, coming, strict=True)
            )

    def _run(self, promotion: Promotion) -> None:
        try:
            self._promote_all(promotion)
        # The thread's boundary: whatever went wrong, the lookup goes on with what is in memory.
        except Exception:
            logger.exception("a promotion failed")
        with self._state.lock:
            self._active.discard(promotion)
            if promotion.state != "expired":
                promotion.on_end(promotion)
            self._state.references.release(promotion)

    def _promote_all(self, promotion: Promotion) -> None:
        """Promote chunk by chunk, each from the first tier that has it."""
        stores = [store for store in self._stores if not store.resting]
        while stores and promotion.running:
            for store in tuple(stores):
                promotion.store = store
                if self._promote_from(store, promotion):
                    break
                stores.remove(store)

    def _promote_from(self, store: BlobStore, promotion: Promotion) -> bool:
        """Promote the chunks that come next; False when the store has no more of them."""
        query, before = promotion.query, promotion.promoted
        try:
            found = _beyond(store, promotion)
            if not found and store.shared:
                found = store.match_store(query, promotion.start, promotion.parent)
            target = PromotionTarget(promotion, query, lambda: not promotion.running)
            reader = self._readers[store.location]
            with closing(reader.fetch([key for key, _ in found], target)) as coming:
                for (key, usable), here in zip(found, coming, strict=True):
                    if not here or not promotion.running:
                        return False
                    promotion.promoted += 1
                    if usable < query.chunk_size:
                        self._complete(promotion)
                        return False
                    promotion.start += query.chunk_size
                    promotion.parent, promotion.usable = key, 0
        except BackendError as error:
            logger.debug("a promotion from %s ended: %s", store.location, error)
            return False
        return promotion.promoted > before

    def _complete(self, promotion: Promotion) -> None:
        with self._state.lock:
            if promotion.running:
                promotion.state = "complete"


def _after(promotion: Promotion, found: Walk) -> Promotion:
    """Set a promotion to begin where a match ends."""
    for located, _ in found[-2:]:
        if located.usable < promotion.query.chunk_size:
            promotion.usable = located.usable
        else:
            promotion.start, promotion.parent = located.end, located.key
    return promotion


def _may_help(store: BlobStore, promotion: Promotion) -> bool:
    return not store.resting and (store.shared or bool(_beyond(store, promotion)))


def _beyond(store: BlobStore, promotion: Promotion) -> list[tuple[ChunkKey, int]]:
    """Return the chunks in a store's index that go further than the match in memory."""
    found = store.match_index(promotion.query, promotion.start, promotion.parent)
    return found if found and found[0][1] > promotion.usable else []
