"""Recalls: what a tier below holds comes back into memory."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_kit.cache.tiers.tier_reader import PromotionTarget, TierReader
from lmcache_kit.errors import BackendError
from lmcache_kit.keys import TOKEN_BYTES, ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import MemoryIndex
    from lmcache_kit.cache.index.references import References
    from lmcache_kit.cache.lookup import Lookups, Search, Walk
    from lmcache_kit.cache.memory.transfers import GetCodec, Transfers
    from lmcache_kit.cache.tiers.store_tier import StoreTier

MAX_THREADS = 4
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Promotion:
    """What comes back for one lookup: all that follows the chunk ``parent``, which ends before the
    token ``start``, and of whose successors memory has one with ``usable`` tokens in common.
    ``asked`` is the tier that is at work; ``taken`` counts what has come."""

    search: Search
    start: int
    parent: ChunkKey
    usable: int
    cancelled: bool = False
    orphaned: bool = False
    asked: StoreTier | None = None
    taken: int = 0


class Promotions:
    """Brings chunks from ``tiers``, the first ones first, into memory. ``transfers`` lands them."""

    def __init__(
        self,
        tiers: Sequence[StoreTier],
        index: MemoryIndex,
        transfers: Transfers,
        lookups: Lookups,
        get_codec: GetCodec,
        *,
        references: References,
        counters: Counter[str],
        lock: AbstractContextManager[object],
    ) -> None:
        self._tiers = tiers
        self._references = references
        self._lookups = lookups
        self._readers = {
            tier.location: TierReader(tier, index, transfers, get_codec) for tier in tiers
        }
        self._counters = counters
        self._lock = lock
        self._active: set[Promotion] = set()
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="lmcache-kit-promote"
        )

    # For lookups, under the engine's lock.

    def begin(self, search: Search, walk: Walk) -> bool:
        """Bring what memory, where ``walk`` leads, lacks; then the lookup begins there. False when
        no tier may have it."""
        reached = walk[-1][0].end if walk else 0
        if reached * TOKEN_BYTES >= len(search.query.tokens):
            return False
        promotion = _after(search, walk)
        if not any(self._may_help(tier, promotion) for tier in self._tiers):
            return False
        self._counters["promotions_total"] += 1
        # What is here stays.
        self._references.acquire([located.key for located, _ in walk], promotion)
        search.promotion = promotion
        search.waiting += 1
        self._active.add(promotion)
        self._threads.submit(self._run, promotion)
        return True

    def cancel(self, promotion: Promotion) -> None:
        """The lookup waits no longer."""
        promotion.search.promotion = None
        promotion.cancelled = True
        self._counters["promotions_late_total"] += 1
        if promotion.asked and not promotion.taken:
            promotion.asked.late()

    def drop_owner(self, owner: Hashable) -> None:
        """Nobody will come for the lookups of this owner."""
        for promotion in self._active:
            if promotion.search.owner == owner:
                promotion.cancelled = promotion.orphaned = True

    def close(self) -> None:
        """Stop, and wait for what is at work."""
        for promotion in tuple(self._active):
            promotion.cancelled = True
        self._threads.shutdown(cancel_futures=True)
        for tier_reader in self._readers.values():
            tier_reader.close()

    # For moves.

    def promote(self, tier: StoreTier, keys: Sequence[ChunkKey], owner: Hashable) -> bool:
        """Have these chunks in memory, anchored for ``owner``; what is not in the tier (any more)
        is passed over. False when there is no room for all. Raises BackendError."""
        absent = self._references.acquire(keys, owner)
        with closing(self._readers[tier.location].fetch(absent, PromotionTarget(owner))) as coming:
            return all(
                here or not tier.contains(key) for key, here in zip(absent, coming, strict=True)
            )

    def _may_help(self, tier: StoreTier, promotion: Promotion) -> bool:
        return not tier.resting and (tier.shared or bool(_beyond(tier, promotion)))

    def _run(self, promotion: Promotion) -> None:
        search = promotion.search
        try:
            self._promote_all(promotion)
        # The thread's boundary: whatever went wrong, the lookup goes on with what is in memory.
        except Exception:
            logger.exception("a promotion failed")
        with self._lock:
            self._active.discard(promotion)
            if search.promotion is promotion:
                search.promotion = None
                if not promotion.orphaned:
                    self._lookups.begin(search, self._lookups.walk(search.query))
                search.one_ended()
            self._references.release(promotion)

    def _promote_all(self, promotion: Promotion) -> None:
        """Chunk by chunk, each from the first tier that has it."""
        tiers = [tier for tier in self._tiers if not tier.resting]
        while tiers and not promotion.cancelled:
            for tier in tuple(tiers):
                promotion.asked = tier
                if not self._promote_from(tier, promotion):
                    tiers.remove(tier)
                    continue
                break

    def _promote_from(self, tier: StoreTier, promotion: Promotion) -> bool:
        """What goes on from where we are; False when nothing more can be had from this tier."""
        query = promotion.search.query
        taken = promotion.taken
        try:
            found = _beyond(tier, promotion)
            if not found and tier.shared:
                found = tier.ask(query, promotion.start, promotion.parent)
            target = PromotionTarget(promotion, query, lambda: promotion.cancelled)
            tier_reader = self._readers[tier.location]
            with closing(tier_reader.fetch([key for key, _ in found], target)) as coming:
                for (key, usable), here in zip(found, coming, strict=True):
                    if not here or promotion.cancelled:
                        return False
                    promotion.taken += 1
                    if usable < query.chunk_size:
                        promotion.cancelled = True  # this was the last one
                        return False
                    promotion.start += query.chunk_size
                    promotion.parent, promotion.usable = key, 0
        except BackendError as error:
            logger.debug("a promotion from %s ended: %s", tier.location, error)
            return False
        return promotion.taken > taken


def _after(search: Search, walk: Walk) -> Promotion:
    """Where what is in memory ends."""
    promotion = Promotion(search, 0, b"", 0)
    for located, _ in walk[-2:]:
        if located.usable < search.query.chunk_size:
            promotion.usable = located.usable
        else:
            promotion.start, promotion.parent = located.end, located.key
    return promotion


def _beyond(tier: StoreTier, promotion: Promotion) -> list[tuple[ChunkKey, int]]:
    """What the tier is known to have that goes on further than memory does."""
    found = tier.reach(promotion.search.query, promotion.start, promotion.parent)
    return found if found and found[0][1] > promotion.usable else []
