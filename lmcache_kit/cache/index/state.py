"""The state that all parts of one tier share."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.holds import Leases, Pins, References
from lmcache_kit.metrics import MetricSet

IndexT_co = TypeVar("IndexT_co", bound=ChunkIndex, covariant=True)


class TierState(Generic[IndexT_co]):
    """Lock, index, holds and counters of one tier. Its owner makes it once; parts get it whole.

    ``lock`` guards everything else here. ``version`` grows with each change that may let a waiting
    thread go on: a store that ended, a hold that was released, memory that became free.
    """

    def __init__(
        self,
        location: str,
        index: IndexT_co,
        *,
        metrics: MetricSet,
        pin_budget_bytes: int,
        clock: Callable[[], float],
        lease_ttl_s: float = 120.0,
    ) -> None:
        self.location = location
        self.index = index
        self.clock = clock
        self.lease_ttl_s = lease_ttl_s
        self.lock = threading.RLock()
        self.counters: Counter[str] = metrics.counters()
        self.leases = Leases(index, lease_ttl_s, clock)
        self.pins = Pins(index, pin_budget_bytes, clock)
        self.references = References(index, self.lock)
        self.version = 0
        self._changed = threading.Condition(self.lock)
        self._waiting = 0
        index.notify = self.notify

    def notify(self) -> None:
        """Wake the threads in :meth:`wait_for`. Called under the lock."""
        self.version += 1
        if self._waiting:
            self._changed.notify_all()

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``predicate``, called under the lock, is true. False after ``timeout_s``."""
        with self.lock:
            self._waiting += 1
            try:
                return self._changed.wait_for(predicate, timeout_s)
            finally:
                self._waiting -= 1

    def expire_holds(self) -> int:
        """End leases and pins whose time is over; returns how many leases ended."""
        self.counters["expired_pins_total"] += self.pins.expire()
        ended = self.leases.expire()
        if ended:
            self.counters["expired_leases_total"] += ended
        return ended
