"""A store tier: a location below memory, whose chunks are blobs in a backend."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection

from lmcache_kit.cache.descriptors import DeleteResult
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.memory.transfers import GetCodec
from lmcache_kit.cache.metrics import LOWER_TIER
from lmcache_kit.cache.records import Selected, Transcoded
from lmcache_kit.cache.tier import Tier
from lmcache_kit.cache.tiers.blob_store import BlobStore
from lmcache_kit.cache.tiers.circuit_breaker import CircuitBreaker
from lmcache_kit.cache.tiers.serial_executor import SerialExecutor
from lmcache_kit.cache.tiers.store_index import StoreIndex
from lmcache_kit.cache.tiers.transcoding import decode_stored, encode_stored
from lmcache_kit.interfaces import Backend, EvictionPolicy, ReportsMetrics
from lmcache_kit.interfaces.codec import Codec
from lmcache_kit.keys import ChunkKey

logger = logging.getLogger(__name__)


class StoreTier(Tier):
    """The chunks in ``backend``, which the tier owns and closes. ``get_codec`` decodes them."""

    def __init__(
        self,
        backend: Backend,
        policy: EvictionPolicy,
        *,
        location: str,
        get_codec: GetCodec,
        max_pinned_share: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        state: TierState[StoreIndex] = TierState(
            location,
            StoreIndex(policy),
            metrics=LOWER_TIER,
            pin_budget_bytes=sys.maxsize,
            clock=clock,
        )
        super().__init__(state)
        breaker = CircuitBreaker(location, state.counters, clock)
        self.store = BlobStore(backend, state, breaker, max_pinned_share)
        self._store_index = state.index
        self._get_codec = get_codec
        self._reporter = backend if isinstance(backend, ReportsMetrics) else None

    @property
    def executor(self) -> SerialExecutor:
        """The thread that changes the store."""
        return self.store.executor

    def start(self) -> None:
        """Scan the store in the background."""
        self.store.start()

    def close(self) -> None:
        """Write what waits, for a few seconds, and close the store. Safe to call twice."""
        self.store.close()

    def expire(self) -> None:
        """End pins whose time is over, and try again what failed."""
        with self._lock:
            self._state.expire_holds()
        self.store.retry()

    def stats(self) -> dict[str, float]:
        """Return the metrics of the tier, and those that its backend reports."""
        reported = self._reported()
        with self._lock:
            return {
                **reported,
                **self._counters,
                "chunks": len(self._index.entries),
                "stored_bytes": self._store_index.nbytes,
                "pins": len(self._pins),
                "pinned_bytes": self._pins.pinned_bytes,
                "waiting": self.executor.waiting,
                "passed_over_total": self.executor.passed_over,
                "down": float(bool(self.store.why_down)),
                "resting": float(self.store.resting),
            }

    def _reported(self) -> dict[str, float]:
        try:
            return dict(self._reporter.metrics()) if self._reporter else {}
        # A backend is third-party code: its metrics are left out, and the tier goes on.
        except Exception as error:  # noqa: BLE001
            logger.warning("%s does not report its metrics: %r", self.location, error)
            return {}

    # What operators ask for. Each of these may wait for the store.

    def clear(
        self,
        namespaces: Collection[bytes] | None = None,
        tokens: bytes | None = None,
        *,
        force: bool = False,
    ) -> tuple[Selected, Selected]:
        """See :class:`~lmcache_kit.cache.tier.Tier`.

        Raises BackendError when the store does not remove the blobs. The index has dropped them
        then, and their removal is tried again.
        """

        def change() -> tuple[Selected, Selected]:
            both = super(StoreTier, self).clear(namespaces, tokens, force=force)
            self.store.sweep()
            return both

        return self.executor.call(change)

    def delete(self, keys: Collection[ChunkKey]) -> DeleteResult:
        """See :class:`~lmcache_kit.cache.tier.Tier`."""
        deleted = super().delete(keys)
        self.executor.enqueue(self.store.sweep)
        return deleted

    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier.Tier`."""
        return encode_stored(self.store, key, method, codec)

    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """See :class:`~lmcache_kit.cache.tier.Tier`."""
        return decode_stored(self.store, key, method, self._get_codec)
