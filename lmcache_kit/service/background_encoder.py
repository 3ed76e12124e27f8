"""``store_codec``: every chunk is encoded as soon as it is stored."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from lmcache_kit.errors import KitError
from lmcache_kit.service.codecs import encoding_threads

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.records import StoredChunk
    from lmcache_kit.keys import ChunkKey
    from lmcache_kit.service.codecs import Codecs

logger = logging.getLogger(__name__)

MAX_WAITING = 1 << 16


class BackgroundEncoder:
    """Listen to an engine, and encode with codec ``method`` what is stored.

    Not more than ``MAX_WAITING`` chunks wait; what comes then stays raw, and is counted. ``then``
    hears of each chunk afterwards, encoded or not.
    """

    def __init__(
        self,
        engine: CacheEngine,
        codecs: Codecs,
        method: str,
        *,
        then: Callable[[ChunkKey], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._codecs = codecs
        self._method = method
        self._then = then
        self._pool = ThreadPoolExecutor(encoding_threads(), thread_name_prefix="lmcache-kit-encode")
        self._lock = threading.Lock()
        self._waiting = 0
        self._passed_over = 0
        self._pool.submit(self._warm_up)
        engine.memory_tier.subscribe(self)

    def added(self, chunk: StoredChunk) -> None:
        """Called under the engine's lock."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                self._passed_over += 1
            else:
                self._waiting += 1
                self._pool.submit(self._encode, chunk.key)
                return
        self._then(chunk.key)

    def removed(self, key: ChunkKey) -> None:
        """Its turn will come, and find nothing."""

    def stats(self) -> dict[str, float]:
        """A gauge and a counter."""
        return {"encode_waiting": self._waiting, "encode_passed_over_total": self._passed_over}

    def close(self) -> None:
        """End, when the chunks at work are done. To be called before the engine's."""
        with suppress(ValueError):  # a closed engine has dropped its listeners
            self._engine.memory_tier.unsubscribe(self)
        self._pool.shutdown(cancel_futures=True)

    def _warm_up(self) -> None:
        try:
            self._codecs.get(self._method)
        except KitError as error:
            logger.error("chunks stay raw, since codec %r does not work: %s", self._method, error)

    def _encode(self, key: ChunkKey) -> None:
        with suppress(KitError):  # a codec that does not work was said once
            result = self._engine.memory_tier.encode(
                key, self._method, self._codecs.get(self._method)
            )
            if result.why:
                logger.debug("chunk %s stays raw: %s", key.hex(), result.why)
        with self._lock:
            self._waiting -= 1
        self._then(key)
