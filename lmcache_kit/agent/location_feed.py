"""What one location of a cache process announces, and who waits for it to be known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.sync_barrier import SyncBarrier
from lmcache_kit.cache.records import ChangeListener, StoredChunk
from lmcache_kit.keys import ChunkKey


class Announced(Protocol):
    """What is needed of an :class:`~lmcache_kit.cache.tier.Tier`."""

    @property
    def location(self) -> str: ...

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]: ...

    def unsubscribe(self, listener: ChangeListener) -> None: ...

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None: ...


class LocationFeed:
    """A :class:`~lmcache_kit.cache.records.ChangeListener` of ``inventory``; ``ring`` wakes whoever
    sends what was noted."""

    def __init__(
        self,
        inventory: Announced,
        announcer: EventLog | None = None,
        *,
        ring: Callable[[], None] = lambda: None,
    ) -> None:
        self.location = inventory.location
        self.announcer = announcer or EventLog(inventory.location)
        self.confirmations = SyncBarrier()
        self._inventory = inventory
        self._ring = ring

    def begin(self) -> None:
        """Listen, from now on."""
        self.announcer.begin_with(self._inventory.subscribe(self))

    def end(self) -> None:
        """Listen no longer."""
        with contextlib.suppress(ValueError):  # one that is closed has forgotten us
            self._inventory.unsubscribe(self)

    def added(self, chunk: StoredChunk) -> None:
        """Take a note."""
        self.announcer.added(chunk)
        self._ring()

    def removed(self, key: ChunkKey) -> None:
        """Take a note."""
        self.announcer.removed(key)
        self._ring()

    def take_snapshot(self) -> None:
        """All there is, instead of the changes that led to it."""
        self._inventory.snapshot(self.announcer.snapshot_is)
        self.announcer.start_snapshot()
