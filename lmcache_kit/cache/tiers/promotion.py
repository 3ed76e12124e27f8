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
        shelf: MemoryIndex,
        transfers: Transfers,
        lookups: Lookups,
        get_codec: GetCodec,
        *,
        anchors: References,
        counters: Counter[str],
        lock: AbstractContextManager[object],
    ) -> None:
        self._tiers = tiers
        self._anchors = anchors
        self._lookups = lookups
        self._fetchers = {
            tier.location: TierReader(tier, shelf, transfers, get_codec) for tier in tiers
        }
        self._counters = counters
        self._lock = lock
        self._active: set[Promotion] = set()
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="lmcache-kit-recall"
        )

    # For lookups, under the engine's lock.

    def begin(self, search: Search, walk: Walk) -> bool:
        """Bring what memory, where ``walk`` leads, lacks; then the lookup begins there. False when
        no tier may have it."""
        reached = walk[-1][0].end if walk else 0
        if reached * TOKEN_BYTES >= len(search.query.tokens):
            return False
        bringing = _after(search, walk)
        if not any(self._may_help(tier, bringing) for tier in self._tiers):
            return False
        self._counters["recalls_total"] += 1
        # What is here stays.
        self._anchors.add([located.key for located, _ in walk], bringing)
        search.bringing = bringing
        search.waiting += 1
        self._active.add(bringing)
        self._threads.submit(self._run, bringing)
        return True

    def cancel(self, bringing: Promotion) -> None:
        """The lookup waits no longer."""
        bringing.search.bringing = None
        bringing.cancelled = True
        self._counters["recalls_late_total"] += 1
        if bringing.asked and not bringing.taken:
            bringing.asked.late()

    def drop_owner(self, owner: Hashable) -> None:
        """Nobody will come for the lookups of this owner."""
        for bringing in self._active:
            if bringing.search.owner == owner:
                bringing.cancelled = bringing.orphaned = True

    def close(self) -> None:
        """Stop, and wait for what is at work."""
        for bringing in tuple(self._active):
            bringing.cancelled = True
        self._threads.shutdown(cancel_futures=True)
        for fetcher in self._fetchers.values():
            fetcher.close()

    # For moves.

    def bring(self, tier: StoreTier, keys: Sequence[ChunkKey], owner: Hashable) -> bool:
        """Have these chunks in memory, anchored for ``owner``; what is not in the tier (any more)
        is passed over. False when there is no room for all. Raises BackendError."""
        absent = self._anchors.add(keys, owner)
        with closing(self._fetchers[tier.location].fetch(absent, PromotionTarget(owner))) as coming:
            return all(
                here or not tier.holds(key) for key, here in zip(absent, coming, strict=True)
            )

    def _may_help(self, tier: StoreTier, bringing: Promotion) -> bool:
        return not tier.resting and (tier.shared or bool(_beyond(tier, bringing)))

    def _run(self, bringing: Promotion) -> None:
        search = bringing.search
        try:
            self._bring_all(bringing)
        # The thread's boundary: whatever went wrong, the lookup goes on with what is in memory.
        except Exception:
            logger.exception("a recall failed")
        with self._lock:
            self._active.discard(bringing)
            if search.bringing is bringing:
                search.bringing = None
                if not bringing.orphaned:
                    self._lookups.begin(search, self._lookups.walk(search.query))
                search.one_ended()
            self._anchors.let_go(bringing)

    def _bring_all(self, bringing: Promotion) -> None:
        """Chunk by chunk, each from the first tier that has it."""
        tiers = [tier for tier in self._tiers if not tier.resting]
        while tiers and not bringing.cancelled:
            for tier in tuple(tiers):
                bringing.asked = tier
                if not self._bring_from(tier, bringing):
                    tiers.remove(tier)
                    continue
                break

    def _bring_from(self, tier: StoreTier, bringing: Promotion) -> bool:
        """What goes on from where we are; False when nothing more can be had from this tier."""
        query = bringing.search.query
        taken = bringing.taken
        try:
            found = _beyond(tier, bringing)
            if not found and tier.shared:
                found = tier.ask(query, bringing.start, bringing.parent)
            taker = PromotionTarget(bringing, query, lambda: bringing.cancelled)
            fetcher = self._fetchers[tier.location]
            with closing(fetcher.fetch([key for key, _ in found], taker)) as coming:
                for (key, usable), here in zip(found, coming, strict=True):
                    if not here or bringing.cancelled:
                        return False
                    bringing.taken += 1
                    if usable < query.chunk_size:
                        bringing.cancelled = True  # this was the last one
                        return False
                    bringing.start += query.chunk_size
                    bringing.parent, bringing.usable = key, 0
        except BackendError as error:
            logger.debug("a recall from %s ended: %s", tier.location, error)
            return False
        return bringing.taken > taken


def _after(search: Search, walk: Walk) -> Promotion:
    """Where what is in memory ends."""
    bringing = Promotion(search, 0, b"", 0)
    for located, _ in walk[-2:]:
        if located.usable < search.query.chunk_size:
            bringing.usable = located.usable
        else:
            bringing.start, bringing.parent = located.end, located.key
    return bringing


def _beyond(tier: StoreTier, bringing: Promotion) -> list[tuple[ChunkKey, int]]:
    """What the tier is known to have that goes on further than memory does."""
    found = tier.reach(bringing.search.query, bringing.start, bringing.parent)
    return found if found and found[0][1] > bringing.usable else []
