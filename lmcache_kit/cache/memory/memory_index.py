"""The index of the memory tier: each entry's payload owns regions of the backend."""

from __future__ import annotations

from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.entries import Entry, Payload
from lmcache_kit.interfaces import EvictionPolicy, MemoryBackend, Region


class MemoryIndex(ChunkIndex):
    """A chunk index whose payloads own regions of ``memory``."""

    def __init__(self, memory: MemoryBackend, policy: EvictionPolicy) -> None:
        super().__init__(policy)
        self.memory = memory
        self.capacity_bytes = memory.usage().capacity_bytes
        self._at: dict[int, Entry] = {}

    def put(self, entry: Entry) -> None:
        super().put(entry)
        self._own(entry)

    def attach_payload(self, entry: Entry, payload: Payload) -> None:
        super().attach_payload(entry, payload)
        self._own(entry)

    def detach(self, entry: Entry) -> None:
        super().detach(entry)
        for region in entry.payload.regions:
            self._at.pop(region.offset, None)
        self.release_if_unused(entry.payload)

    def replace_region(self, entry: Entry, rank: int, region: Region) -> None:
        """Replace the region that was reserved for a rank by one of another size."""
        self.free(entry.payload.regions[rank])
        entry.payload.regions[rank] = region
        self._own(entry)

    def release_if_unused(self, payload: Payload) -> None:
        """Free the regions of a payload that no entry and no hold needs."""
        if not payload.attached and not payload.ref_count:
            for region in payload.regions:
                self.free(region)
            payload.regions = []

    def free(self, region: Region) -> None:
        self._at.pop(region.offset, None)
        self.memory.free(region)

    def owner_of(self, region: Region) -> Entry | None:
        """Return the linked entry that owns a region.

        None for a region that is just being allocated, and for one of a detached payload.
        """
        return self._at.get(region.offset)

    def _own(self, entry: Entry) -> None:
        for region in entry.payload.regions:
            self._at[region.offset] = entry
