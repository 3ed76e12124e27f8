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

    blob_encoding: Encoding | None = None

    @property
    def sizes(self) -> list[int]:
        return [extent.nbytes for extent in self.extents]


class StoreIndex(ChunkIndex):
    """The index of a store tier.

    ``nbytes``: bytes in the store, without its own overhead. ``pending_deletes``: keys that have
    left the index and are still to be removed from the store.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__(policy)
        self.nbytes = 0
        self.pending_deletes: dict[ChunkKey, None] = {}

    def put(self, entry: Entry) -> None:
        super().put(entry)
        self.nbytes += entry.nbytes

    def attach_payload(self, entry: Entry, payload: Payload) -> None:
        super().attach_payload(entry, payload)
        self.nbytes += payload.nbytes

    def detach(self, entry: Entry) -> None:
        super().detach(entry)
        self.nbytes -= entry.nbytes

    def unlink(self, entry: Entry) -> None:
        if entry.linked:
            self.pending_deletes[entry.key] = None
        super().unlink(entry)
