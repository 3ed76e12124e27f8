"""What the index of a tier knows of its chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_kit.cache.index.chunk_index import ChunkIndex
from lmcache_kit.cache.index.entries import Entry, Payload

if TYPE_CHECKING:
    from lmcache_kit.cache.descriptors import Encoding
    from lmcache_kit.interfaces import EvictionPolicy
    from lmcache_kit.keys import ChunkKey


@dataclass(slots=True, eq=False)
class StoredPayload(Payload):
    """Bytes of a chunk in a store; ``extents`` count from the start of the blob's data."""

    packing: Encoding | None = None

    @property
    def sizes(self) -> list[int]:
        return [extent.nbytes for extent in self.extents]


class StoreIndex(ChunkIndex):
    """``nbytes``: what lies in the store, without its own overhead. ``doomed``: what has left the
    shelf, and must leave the store, too."""

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__(policy)
        self.nbytes = 0
        self.doomed: dict[ChunkKey, None] = {}

    def put(self, entry: Entry) -> None:
        super().put(entry)
        self.nbytes += entry.nbytes

    def adopt(self, entry: Entry, body: Payload) -> None:
        super().adopt(entry, body)
        self.nbytes += body.nbytes

    def forsake(self, entry: Entry) -> None:
        super().forsake(entry)
        self.nbytes -= entry.nbytes

    def unlink(self, entry: Entry) -> None:
        if entry.linked:
            self.doomed[entry.key] = None
        super().unlink(entry)
