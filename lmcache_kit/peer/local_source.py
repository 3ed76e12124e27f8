"""The source of a move within an instance: a location of this cache process."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from lmcache_kit.interfaces.operations import Transfer
from lmcache_kit.peer.promotion import ROOM_S, promote

if TYPE_CHECKING:
    from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.tier import Tier
    from lmcache_kit.keys import ChunkKey
    from lmcache_kit.peer.move_source import MoveStats

WINDOW_BYTES = 32 * 1024 * 1024
"""So much at a time, so that progress is seen and a cancelled move ends soon."""


class LocalSource:
    """See :class:`~lmcache_kit.peer.move_source.MoveSource`.

    Chunks of a tier go through memory. Where memory is only a stop on the way to another tier, a
    move waits for room in it; a move into memory ends when memory is full.
    """

    def __init__(
        self,
        engine: CacheEngine,
        source: Tier,
        destination: Tier,
        *,
        namespaces: Sequence[bytes] | None,
        tokens: bytes | None,
    ) -> None:
        self.name = source.location
        self.chunks: Sequence[ChunkRef] = source.chunk_refs(namespaces, tokens)
        self.incompatible: Mapping[str, int] = {}
        self.window_bytes = WINDOW_BYTES
        self._engine = engine
        self._source = source
        self._wait_s = 0.0 if destination is engine.memory_tier else ROOM_S
        self._aborted = threading.Event()
        infos = source.namespaces({chunk.namespace for chunk in self.chunks})
        self._chunk_sizes = {info.digest: info.chunk_size for info in infos}
        self._nbytes = {chunk.key: chunk.nbytes for chunk in self.chunks}

    def chunk_size(self, namespace: bytes) -> int:
        # A namespace whose last chunk has just been deleted is unknown.
        return self._chunk_sizes.get(namespace, 1)

    def transfer(self, stats: MoveStats) -> Transfer:
        return Transfer("local", "within the host", stats.nbytes, stats.seconds)

    def receive(
        self, keys: Sequence[ChunkKey], *, owner: Hashable, stats: MoveStats, timeout_s: float
    ) -> None:
        begin = time.monotonic()
        try:
            promote(
                self._engine,
                self._source,
                keys,
                owner,
                min(self._wait_s, timeout_s),
                cancelled=self._aborted.is_set,
            )
        finally:
            stats.seconds += time.monotonic() - begin
            missing = set(self._engine.memory_tier.references.acquire(keys, owner))
            arrived = [key for key in keys if key not in missing]
            stats.add_arrived(arrived)
            stats.nbytes += sum([self._nbytes[key] for key in arrived])
        refused = [key for key in missing if self._source.contains(key)]
        stats.gone += len(missing) - len(refused)
        stats.full = stats.full or bool(refused)

    def end_receiving(self) -> None:
        """Nothing but references is held, which belong to the move."""

    def delete(self, keys: Sequence[ChunkKey]) -> DeleteResult:
        return self._source.delete(keys)

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        """Nothing is open."""
