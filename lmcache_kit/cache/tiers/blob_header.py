"""Labels: what a tier keeps beside a chunk's bytes, so that they can be understood without us."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_digest

from lmcache_kit.cache.descriptors import ChunkDescriptor, NamespaceInfo
from lmcache_kit.cache.records import Extent
from lmcache_kit.interfaces.backend import MAX_META_BYTES
from lmcache_kit.keys import ChunkKey

FORMAT = 1
_CHECKSUM_BYTES = 8


class BlobHeader(NamedTuple):
    """All that is to be known of a blob: the chunk, whose extents count from the start of the
    data, and its namespace."""

    parcel: ChunkDescriptor
    space: NamespaceInfo

    def encode(self) -> bytes:
        """The xxh3-64 of what follows, and msgpack."""
        packed = msgspec.msgpack.encode((FORMAT, self.parcel, self.space))
        return xxh3_64_digest(packed) + packed

    @classmethod
    def decode(cls, key: ChunkKey, meta: bytes, nbytes: int | None) -> BlobHeader:
        """Of the blob that lies under ``key`` with so many bytes of data, if that is known. Raises
        ValueError when it is damaged, of another format or key, or not what its key says."""
        checksum, packed = meta[:_CHECKSUM_BYTES], meta[_CHECKSUM_BYTES:]
        if len(meta) > MAX_META_BYTES or xxh3_64_digest(packed) != checksum:
            raise ValueError("the label is damaged")
        try:
            _, parcel, space = msgspec.msgpack.decode(
                packed, type=tuple[int, ChunkDescriptor, NamespaceInfo]
            )
        except msgspec.ValidationError:
            raise ValueError("the label is of another format") from None
        if parcel.key != key or not parcel.is_sound(space):
            raise ValueError("the label is of another chunk")
        if parcel.extents != packed_tight(parcel).extents:
            raise ValueError("the label is of ranks that do not follow each other")
        if nbytes is not None and parcel.nbytes != nbytes:
            raise ValueError(f"the label is of {parcel.nbytes} bytes, and there are {nbytes}")
        return cls(parcel, space)


def packed_tight(parcel: ChunkDescriptor) -> ChunkDescriptor:
    """The parcel with its extents one after the other."""
    sizes = [extent.nbytes for extent in parcel.extents]
    starts = accumulate(sizes, initial=0)
    return parcel._replace(
        extents=tuple(
            Extent(start, extent.nbytes, extent.checksum)
            for start, extent in zip(starts, parcel.extents, strict=False)
        )
    )


def payloads(parcel: ChunkDescriptor, data: memoryview) -> list[memoryview]:
    """The bytes of each rank."""
    return [data[extent.offset : extent.offset + extent.nbytes] for extent in parcel.extents]
