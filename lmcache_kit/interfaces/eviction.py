"""Contract of eviction policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from lmcache_kit.keys import ChunkKey


class EvictionPolicy(ABC):
    """Decide in which order a location evicts chunks.

    The engine reports every chunk that is added, used or removed, under its lock: methods must not
    block. The chunks of a prefix are touched from the last to the first, so that the end of a
    prefix is evicted before its start.

    >>> from lmcache_kit.cache.index.policies import LRU
    >>> policy = LRU()
    >>> policy.added(b"a"); policy.added(b"b"); policy.touched(b"a")
    >>> list(policy.victims())
    [b'b', b'a']
    """

    @abstractmethod
    def added(self, key: ChunkKey) -> None:
        """Note a new chunk."""

    @abstractmethod
    def touched(self, key: ChunkKey) -> None:
        """Note that a lookup has found the chunk and will load it."""

    @abstractmethod
    def removed(self, key: ChunkKey) -> None:
        """Note that the chunk was removed, by eviction or otherwise."""

    @abstractmethod
    def victims(self) -> Iterator[ChunkKey]:
        """Yield all chunks in the order of eviction.

        The engine skips chunks in use and chunks that others still follow. It consumes as many as
        it needs before it changes anything.
        """
