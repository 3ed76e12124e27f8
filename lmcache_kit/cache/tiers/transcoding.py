"""Transcoding of blobs: read, convert, verify and replace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.descriptors import Encoding
from lmcache_kit.cache.index.entries import Entry
from lmcache_kit.cache.memory.transcoding import (
    CorruptPayload,
    check_payload,
    encode_payload,
    not_raw,
)
from lmcache_kit.cache.memory.transfers import GetCodec
from lmcache_kit.cache.records import Extent, Transcoded
from lmcache_kit.cache.tiers.blob_header import BlobHeader
from lmcache_kit.cache.tiers.blob_store import BlobStore
from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces.codec import ChunkInfo, Codec
from lmcache_kit.keys import ChunkKey

Convert: TypeAlias = Callable[[memoryview, ChunkInfo], bytes | bytearray]

logger = logging.getLogger(__name__)


def encode_stored(store: BlobStore, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
    """Encode a chunk of a store with ``codec``."""
    entry, encoding = store.entry(key)
    if entry is None:
        return Transcoded("gone")
    if encoding is not None:
        return not_raw(encoding.method, method)
    try:
        chunks = tuple([entry.chunk_info(rank) for rank in range(entry.namespace.world_size)])
    except ValueError as error:
        return Transcoded("failed", str(error))

    def encode(payload: memoryview, chunk: ChunkInfo) -> bytes:
        return encode_payload(payload, chunk, codec)

    return _transcode(store, entry, chunks, Encoding(method, codec.format_version, chunks), encode)


def decode_stored(store: BlobStore, key: ChunkKey, method: str, get_codec: GetCodec) -> Transcoded:
    """Decode a chunk of a store that ``method`` has encoded."""
    entry, encoding = store.entry(key)
    if entry is None:
        return Transcoded("gone")
    if encoding is None:
        return Transcoded("already")
    if encoding.method != method:
        return Transcoded("failed", f"it is encoded with {encoding.method}")
    codec = get_codec(method)

    def decode(blob: memoryview, chunk: ChunkInfo) -> bytearray:
        raw = bytearray(chunk.payload_bytes)
        codec.decode(blob, chunk, raw)
        return raw

    return _transcode(store, entry, encoding.chunks, None, decode)


def _transcode(
    store: BlobStore,
    entry: Entry,
    chunks: Sequence[ChunkInfo],
    encoding: Encoding | None,
    convert: Convert,
) -> Transcoded:
    """Read a blob, convert each rank's bytes, and replace it by one with ``encoding``."""
    try:
        found = store.read(entry.key)
        if found is None:
            return Transcoded("gone")
        header, pieces = found
        for piece, extent in zip(pieces, header.descriptor.extents, strict=True):
            check_payload(piece, extent.checksum)
        made = [convert(piece, chunk) for piece, chunk in zip(pieces, chunks, strict=True)]
        extents = tuple([Extent(0, len(each), xxh3_64_intdigest(each)) for each in made])
        descriptor = header.descriptor._replace(extents=extents, encoding=encoding)
        return store.replace(
            entry, BlobHeader(descriptor, header.namespace), [memoryview(each) for each in made]
        )
    except CorruptPayload as error:
        store.mark_corrupt(entry.key, str(error))
        return Transcoded("failed", str(error))
    except (BackendError, ValueError) as error:
        return Transcoded("failed", str(error))
    # A codec is third-party code: whatever it raises, the chunk stays as it was, and that is said.
    except Exception as error:
        logger.exception("could not transcode chunk %s", entry.key.hex())
        return Transcoded("failed", f"{type(error).__name__}: {error}")
