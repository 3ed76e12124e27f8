"""Chunks that stay where they are, because something that is under way needs them there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from lmcache_kit.keys import ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import ChunkIndex
    from lmcache_kit.cache.index.entries import Entry


class References:
    """Of one location. A chunk that is anchored neither leaves nor is it given away until its
    *owner*, one move or one lookup, lets go. ``lock`` is the index's."""

    def __init__(self, index: ChunkIndex, lock: AbstractContextManager[object]) -> None:
        self._index = index
        self._lock = lock
        self._entries: defaultdict[Hashable, dict[ChunkKey, Entry]] = defaultdict(dict)

    def acquire(self, keys: Iterable[ChunkKey], owner: Hashable) -> list[ChunkKey]:
        """Anchor those of these chunks that are here; returns the others."""
        with self._lock:
            missing = []
            for key in keys:
                entry = self._index.entries.get(key)
                if entry is not None and entry.complete:
                    self.acquire_entry(entry, owner)
                else:
                    missing.append(key)
            return missing

    def acquire_entry(self, entry: Entry, owner: Hashable) -> None:
        """Anchor this one. To be called under the lock."""
        if entry.key not in self._entries[owner]:
            self._entries[owner][entry.key] = entry
            entry.ref_count += 1

    def findable(self, owner: Hashable, wanted: Iterable[ChunkKey]) -> list[ChunkKey]:
        """Those of ``wanted``, each after the one that it follows, that are here for ``owner`` and
        can be found: not behind one of them that is not."""
        with self._lock:
            here, found, lacking = self._entries[owner], list[ChunkKey](), set[ChunkKey]()
            for key in wanted:
                entry = here.get(key)
                if entry is None or not entry.linked or entry.parent in lacking:
                    lacking.add(key)
                else:
                    found.append(key)
            return found

    def release(self, owner: Hashable) -> None:
        """It is over: what was anchored is a chunk like any other."""
        with self._lock:
            for entry in self._entries.pop(owner, {}).values():
                entry.ref_count -= 1
