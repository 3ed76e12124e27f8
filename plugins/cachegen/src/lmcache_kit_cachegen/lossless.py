"""Lossless streams: values split into byte planes, each plane compressed by zstd if that helps.

Layout of a ``PLANES`` stream: for each plane, the highest first, its length as u32 and its bytes. A
plane of as many bytes as there are values is not compressed.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard

from lmcache_kit.errors import CorruptBlob
from lmcache_kit_cachegen.bits import Bits
from lmcache_kit_cachegen.bitstream import Coder, Stream
from lmcache_kit_cachegen.tables import U8

_local = threading.local()
_LENGTH = struct.Struct("<I")
_LEVEL = 1


def zstd_compress(data: bytes | memoryview) -> bytes:
    """Compress into one frame that records its decompressed size."""
    if not hasattr(_local, "compress"):
        _local.compress = zstandard.ZstdCompressor(level=_LEVEL)
    packed: bytes = _local.compress.compress(data)
    return packed


def zstd_decompress(data: memoryview, nbytes: int) -> bytes:
    """Decompress one frame. Raises CorruptBlob unless it holds exactly ``nbytes``."""
    if not hasattr(_local, "decompress"):
        _local.decompress = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(data) != nbytes:
            raise CorruptBlob(f"a zstd frame does not hold {nbytes} bytes")
        plain: bytes = _local.decompress.decompress(data, max_output_size=nbytes)
    except zstandard.ZstdError as error:
        raise CorruptBlob(f"a zstd frame does not decode: {error}") from error
    return plain


def encode(words: Bits) -> Stream:
    """Encode ``words``, the bits of values of 1, 2 or 4 bytes; never larger than ``words``."""
    flat = np.ascontiguousarray(words).ravel()
    raw = flat.view(np.uint8).data
    parts: list[bytes | memoryview] = []
    for plane in _planes(flat):
        packed = zstd_compress(plane.data)
        kept = packed if len(packed) < plane.nbytes else plane.data
        parts += [_LENGTH.pack(len(kept)), kept]
    if sum(map(len, parts)) < len(raw):
        return Stream(Coder.PLANES, b"".join(parts))
    return Stream(Coder.RAW, raw)


def decode(stream: Stream, dtype: np.dtype[np.unsignedinteger], count: int) -> Bits:
    """Decode ``count`` words. Raises CorruptBlob if the stream does not hold them."""
    data = memoryview(stream.data)
    if stream.coder == Coder.RAW:
        if len(data) != count * dtype.itemsize:
            raise CorruptBlob(
                f"a raw stream has {len(data)} bytes; {count} values have {count * dtype.itemsize}"
            )
        return np.frombuffer(data, dtype)
    planes, at = [], 0
    for _ in range(dtype.itemsize):
        if at + _LENGTH.size > len(data):
            raise CorruptBlob(
                f"a lossless stream ends at byte {len(data)}, before a plane's length"
            )
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        part = data[at : at + length]
        at += length
        planes.append(
            np.frombuffer(part if length == count else zstd_decompress(part, count), np.uint8)
        )
    if at != len(data):
        raise CorruptBlob(f"a lossless stream has {len(data)} bytes; its planes end at {at}")
    return _unite(planes, dtype)


def _planes(words: Bits) -> list[U8]:
    """Split values into byte planes, the highest first.

    The sign moves to the lowest bit, so that the highest byte is the exponent, which compresses.
    """
    bits = words.itemsize * 8
    turned = words if bits == 8 else (words << 1) | (words >> (bits - 1))
    return [(turned >> shift).astype(np.uint8) for shift in range(bits - 8, -1, -8)]


def _unite(planes: list[U8], dtype: np.dtype[np.unsignedinteger]) -> Bits:
    """Join byte planes into values; the inverse of :func:`_planes`."""
    bits = dtype.itemsize * 8
    if bits == 8:
        return planes[0]
    turned: Any = planes[0].astype(dtype)
    for plane in planes[1:]:
        turned = (turned << 8) | plane
    words: Bits = (turned >> 1) | (turned << (bits - 1))
    return words
