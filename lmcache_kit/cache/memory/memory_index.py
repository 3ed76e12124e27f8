"""The index of the memory tier: each entry's payload owns regions of the backend."""

from __future__ import annotations

from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.entries import Entry, Payload
from lmcache_kit.interfaces import EvictionPolicy, MemoryBackend, Region


class MemoryIndex(ChunkIndex):
    """An index that frees the memory of what leaves it."""

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
        """A rank needs another size than was set aside for it."""
        self.free(entry.payload.regions[rank])
        entry.payload.regions[rank] = region
        self._own(entry)

    def release_if_unused(self, payload: Payload) -> None:
        """Free the memory of a payload that is neither kept nor in use."""
        if not payload.attached and not payload.ref_count:
            for region in payload.regions:
                self.free(region)
            payload.regions = []

    def free(self, region: Region) -> None:
        self._at.pop(region.offset, None)
        self.memory.free(region)

    def owner_of(self, region: Region) -> Entry | None:
        """The linked entry whose memory this is. None for memory that is just being handed out,
        or of payloads that are used only until their readers are done."""
        return self._at.get(region.offset)

    def _own(self, entry: Entry) -> None:
        for region in entry.payload.regions:
            self._at[region.offset] = entry
