"""The order in which chunks may leave a tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.entries import Entry
from lmcache_kit.keys import ChunkKey


def eviction_order(index: ChunkIndex, evictable: Callable[[Entry], bool]) -> Iterator[Entry]:
    """Yield entries in the policy's order, each after all entries that follow it.

    A chunk that leaves before its children would make them unreachable. ``evictable`` excludes
    entries that are in use; these keep their ancestors, too.
    """
    entries = index.entries
    passed: set[ChunkKey] = set()
    gone_children: dict[ChunkKey, int] = {}

    def is_last(key: ChunkKey) -> bool:
        return index.followers(key) == gone_children.get(key, 0)

    for key in index.policy.victims():
        entry = entries[key]
        if not evictable(entry):
            continue
        if not is_last(key):
            passed.add(key)
            continue
        while True:
            yield entry
            gone_children[entry.parent] = gone_children.get(entry.parent, 0) + 1
            # A parent that was passed over comes before everything not seen yet.
            if entry.parent not in passed or not is_last(entry.parent):
                break
            entry = entries[entry.parent]
