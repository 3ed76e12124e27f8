"""Eviction policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from lmcache_kit.keys import ChunkKey


class EvictionPolicy(ABC):
    """Decides in which order chunks leave a location.

    The engine tells it what comes, is used and goes, under its lock; it never blocks. Keys of a
    prefix are touched from the last chunk to the first, so that a tail leaves before its head.

    >>> from lmcache_kit.cache.index.policies import LRU
    >>> policy = LRU()
    >>> policy.added(b"a"); policy.added(b"b"); policy.touched(b"a")
    >>> list(policy.victims())
    [b'b', b'a']
    """

    @abstractmethod
    def added(self, key: ChunkKey) -> None:
        """A chunk that was not there is there."""

    @abstractmethod
    def touched(self, key: ChunkKey) -> None:
        """A chunk was found by a lookup that will load it."""

    @abstractmethod
    def removed(self, key: ChunkKey) -> None:
        """A chunk is gone, evicted or not."""

    @abstractmethod
    def victims(self) -> Iterator[ChunkKey]:
        """All chunks, the first to leave first.

        The engine skips those in use and those that other chunks still follow, and takes only as
        many as it needs before it changes anything.
        """
