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

    descriptor: ChunkDescriptor
    namespace: NamespaceInfo

    def encode(self) -> bytes:
        """The xxh3-64 of what follows, and msgpack."""
        packed = msgspec.msgpack.encode((FORMAT, self.descriptor, self.namespace))
        return xxh3_64_digest(packed) + packed

    @classmethod
    def decode(cls, key: ChunkKey, meta: bytes, nbytes: int | None) -> BlobHeader:
        """Of the blob that lies under ``key`` with so many bytes of data, if that is known. Raises
        ValueError when it is damaged, of another format or key, or not what its key says."""
        checksum, packed = meta[:_CHECKSUM_BYTES], meta[_CHECKSUM_BYTES:]
        if len(meta) > MAX_META_BYTES or xxh3_64_digest(packed) != checksum:
            raise ValueError("the header is damaged")
        try:
            _, descriptor, namespace = msgspec.msgpack.decode(
                packed, type=tuple[int, ChunkDescriptor, NamespaceInfo]
            )
        except msgspec.ValidationError:
            raise ValueError("the header is of another format") from None
        if descriptor.key != key or not descriptor.is_sound(namespace):
            raise ValueError("the header is of another chunk")
        if descriptor.extents != packed_tight(descriptor).extents:
            raise ValueError("the header is of ranks that do not follow each other")
        if nbytes is not None and descriptor.nbytes != nbytes:
            raise ValueError(f"the header is of {descriptor.nbytes} bytes, and there are {nbytes}")
        return cls(descriptor, namespace)


def packed_tight(descriptor: ChunkDescriptor) -> ChunkDescriptor:
    """The descriptor with its extents one after the other."""
    sizes = [extent.nbytes for extent in descriptor.extents]
    starts = accumulate(sizes, initial=0)
    return descriptor._replace(
        extents=tuple(
            Extent(start, extent.nbytes, extent.checksum)
            for start, extent in zip(starts, descriptor.extents, strict=False)
        )
    )


def payloads(descriptor: ChunkDescriptor, data: memoryview) -> list[memoryview]:
    """The bytes of each rank."""
    return [data[extent.offset : extent.offset + extent.nbytes] for extent in descriptor.extents]
