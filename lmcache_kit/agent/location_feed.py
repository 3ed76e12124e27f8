"""The event log and the barriers of one location."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.sync_barrier import SyncBarrier
from lmcache_kit.cache.records import ChangeListener, StoredChunk
from lmcache_kit.keys import ChunkKey


class ChunkSource(Protocol):
    """The part of a :class:`~lmcache_kit.cache.tier.Tier` that the agent uses."""

    @property
    def location(self) -> str: ...

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]: ...

    def unsubscribe(self, listener: ChangeListener) -> None: ...

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None: ...


class LocationFeed:
    """A :class:`~lmcache_kit.cache.records.ChangeListener` that fills the log of one location.

    ``wake`` is called after each change, from the engine's threads.
    """

    def __init__(
        self,
        source: ChunkSource,
        log: EventLog | None = None,
        *,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.location = source.location
        self.log = log or EventLog(source.location)
        self.sync = SyncBarrier()
        self._source = source
        self._wake = wake

    def start(self) -> None:
        """Load the chunks that are there, and listen to changes."""
        self.log.preload(self._source.subscribe(self))

    def stop(self) -> None:
        """Listen no longer."""
        with contextlib.suppress(ValueError):  # a closed tier has dropped its listeners
            self._source.unsubscribe(self)

    def added(self, chunk: StoredChunk) -> None:
        """Append a stored chunk to the log."""
        self.log.added(chunk)
        self._wake()

    def removed(self, key: ChunkKey) -> None:
        """Append the removal of a chunk to the log."""
        self.log.removed(key)
        self._wake()

    def take_snapshot(self) -> None:
        """Load everything at the location into the log, and send it next."""
        self._source.snapshot(self.log.load_snapshot)
        self.log.start_snapshot()
