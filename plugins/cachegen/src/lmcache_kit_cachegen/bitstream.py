"""Byte layout of a blob: a header with a directory, then the streams that the directory lists.

All integers are little-endian. The header ends with a CRC-32 of itself. The directory has the
length and a CRC-32 of each stream; the lengths add up to the blob's. Every flipped bit and every
cut is therefore detected before anything is decoded.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from enum import IntEnum
from math import isfinite
from typing import NamedTuple

import msgspec

from lmcache_kit.errors import BlobMismatch, CorruptBlob, UnknownVersion
from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import DTYPE_BYTES, KVLayout
from lmcache_kit_cachegen.tables import TABLE_SET

FORMAT_VERSION = 1
MAGIC = b"LKCG"
NO_PROFILE = bytes(16)
MAX_DIMENSION = 1 << 24
"""Limit on layers, heads, head size and tokens; a header with more is refused."""

_DTYPES = tuple(DTYPE_BYTES)
_KINDS = ("kv", "mla")
_STYLES = ("neox", "gptj")
# magic, version, header bytes, level, dtype, kind, sink tokens, slices a stream, streams,
# layers, kv heads, head size, tokens, start, table set, profile
_FIXED = struct.Struct("<4sHIBBBBHIIIIIQ8s16s")
_ROPE = struct.Struct("<BIdI")  # style, rotated values of a head, base, listed frequencies
_NO_ROPE = 255
_SMALLEST_BASE, _LARGEST_BASE = 1e-3, 1e15
_ENTRY = struct.Struct("<BII")  # coder, bytes, CRC-32
_CRC = struct.Struct("<I")
_SMALLEST = _FIXED.size + _ROPE.size + _CRC.size


class Coder(IntEnum):
    """Coding of a stream: raw bytes, byte planes (both lossless), rANS or zstd (quantised)."""

    RAW = 0
    PLANES = 1
    RANS = 2
    ZSTD = 3


class Stream(NamedTuple):
    """The bytes of one stream, and their coder."""

    coder: Coder
    data: memoryview | bytes


class Header(msgspec.Struct, frozen=True):
    """Header of a blob. ``profile`` is the 16-byte name of a profile, zero if none is needed."""

    chunk: ChunkInfo
    level: int
    sink_tokens: int
    slices_per_stream: int
    profile: bytes = NO_PROFILE


class Blob(NamedTuple):
    """Header and streams of an intact blob."""

    header: Header
    streams: list[Stream]


def is_valid_rope(rope: Rope | None, head_dim: int) -> bool:
    """Whether the format can describe this rotary embedding of heads of ``head_dim`` values."""
    if rope is None:
        return True
    rotated = rope.rotary_dim
    fits = 0 < rotated <= head_dim and rotated % 2 == 0 and rope.style in _STYLES
    numbers = _SMALLEST_BASE <= rope.base <= _LARGEST_BASE and all(map(isfinite, rope.inv_freq))
    return fits and numbers and len(rope.inv_freq) in (0, rotated // 2)


def header_bytes(rope: Rope | None, streams: int) -> int:
    """Return the size of a header with a directory of ``streams`` entries."""
    listed = len(rope.inv_freq) if rope else 0
    return _SMALLEST + 8 * listed + streams * _ENTRY.size


def write_blob(header: Header, streams: list[Stream]) -> bytes:
    """Return the bytes of a blob."""
    chunk, layout = header.chunk, header.chunk.layout
    fixed = _FIXED.pack(
        MAGIC,
        FORMAT_VERSION,
        header_bytes(chunk.rope, len(streams)),
        header.level,
        _DTYPES.index(layout.dtype),
        _KINDS.index(layout.kind),
        header.sink_tokens,
        header.slices_per_stream,
        len(streams),
        layout.layers,
        layout.kv_heads,
        layout.head_dim,
        chunk.tokens,
        chunk.start,
        TABLE_SET,
        header.profile,
    )
    entries = [_ENTRY.pack(s.coder, len(s.data), zlib.crc32(s.data)) for s in streams]
    head = b"".join([fixed, _pack_rope(chunk.rope), *entries])
    return b"".join([head, _CRC.pack(zlib.crc32(head)), *(s.data for s in streams)])


def read_header(blob: bytes | bytearray | memoryview) -> Header:
    """Read and verify the header alone. Raises CorruptBlob or UnknownVersion."""
    return _read(memoryview(blob).cast("B"))[0]


def read_blob(blob: bytes | bytearray | memoryview) -> Blob:
    """Read header and streams and verify every CRC. Raises CorruptBlob or UnknownVersion."""
    view = memoryview(blob).cast("B")
    header, entries, at = _read(view)
    if at + sum(nbytes for _, nbytes, _ in entries) != len(view):
        listed = at + sum(nbytes for _, nbytes, _ in entries)
        raise CorruptBlob(f"the blob has {len(view)} bytes; its directory adds up to {listed}")
    streams = []
    for number, (coder, nbytes, crc) in enumerate(entries):
        data = view[at : at + nbytes]
        at += nbytes
        if zlib.crc32(data) != crc:
            raise CorruptBlob(f"the checksum of stream {number} is wrong")
        streams.append(Stream(coder, data))
    return Blob(header, streams)


def check_chunk(header: Header, chunk: ChunkInfo) -> None:
    """Raise BlobMismatch unless the header's layout, tokens and start are those of ``chunk``."""
    found = header.chunk
    if (found.layout, found.tokens, found.start) != (chunk.layout, chunk.tokens, chunk.start):
        raise BlobMismatch(
            f"the blob has {found.tokens} tokens from {found.start} on as {found.layout}; "
            f"expected {chunk.tokens} from {chunk.start} on as {chunk.layout}"
        )


def _read(view: memoryview) -> tuple[Header, list[tuple[Coder, int, int]], int]:
    if len(view) < _SMALLEST or bytes(view[:4]) != MAGIC:
        raise CorruptBlob(f"{len(view)} bytes do not begin with a header of cachegen ({MAGIC!r})")
    (
        _,
        version,
        nbytes,
        level,
        dtype,
        kind,
        sinks,
        slices,
        count,
        *shape,
        tokens,
        start,
        tables,
        profile,
    ) = _FIXED.unpack_from(view)
    if version != FORMAT_VERSION:
        raise UnknownVersion(
            f"the blob has format version {version}", hint=f"Known: {FORMAT_VERSION}"
        )
    if not _SMALLEST <= nbytes <= len(view):
        raise CorruptBlob(f"the header claims {nbytes} bytes; the blob has {len(view)}")
    head = view[: nbytes - _CRC.size]
    if _CRC.unpack_from(view, len(head))[0] != zlib.crc32(head):
        raise CorruptBlob("the checksum of the header is wrong")
    if tables != TABLE_SET:
        raise UnknownVersion(
            f"the blob needs table set {tables.hex()}", hint=f"Known: {TABLE_SET.hex()}"
        )
    known = dtype < len(_DTYPES) and kind < len(_KINDS) and level <= 3
    sizes = (*shape, tokens, slices)
    if not known or min(sizes) < 1 or max(sizes) > MAX_DIMENSION or sinks > tokens:
        raise CorruptBlob(
            f"the header describes no chunk: dtype {dtype}, kind {kind}, level {level}, "
            f"sizes {sizes}, {sinks} sink tokens"
        )
    rope, at = _unpack_rope(head, _FIXED.size)
    if at + count * _ENTRY.size != len(head):
        raise CorruptBlob(f"the directory of {count} streams does not fill the header")
    if any(coder not in set(Coder) for coder, _, _ in _ENTRY.iter_unpack(head[at:])):
        raise CorruptBlob(f"a stream has an unknown coder; known are {[*map(int, Coder)]}")
    entries = [(Coder(coder), size, crc) for coder, size, crc in _ENTRY.iter_unpack(head[at:])]
    layers, kv_heads, head_dim = shape
    if not is_valid_rope(rope, head_dim):
        raise CorruptBlob("the header describes no rotary embedding")
    layout = KVLayout(_DTYPES[dtype], layers, kv_heads, head_dim, _KINDS[kind])  # type: ignore[arg-type]
    chunk = ChunkInfo(layout, tokens, start, rope)
    return Header(chunk, level, sinks, slices, profile), entries, nbytes


def _pack_rope(rope: Rope | None) -> bytes:
    if rope is None:
        return _ROPE.pack(_NO_ROPE, 0, 0.0, 0)
    listed = rope.inv_freq
    fixed = _ROPE.pack(_STYLES.index(rope.style), rope.rotary_dim, rope.base, len(listed))
    return fixed + struct.pack(f"<{len(listed)}d", *listed)


def _unpack_rope(head: memoryview, at: int) -> tuple[Rope | None, int]:
    style, rotary_dim, base, count = _ROPE.unpack_from(head, at)
    at += _ROPE.size
    if style == _NO_ROPE:
        return None, at
    if style >= len(_STYLES) or at + 8 * count > len(head):
        raise CorruptBlob("the header describes no rotary embedding")
    listed = struct.unpack_from(f"<{count}d", head, at)
    return Rope(rotary_dim, base, _STYLES[style], listed), at + 8 * count  # type: ignore[arg-type]


def digest(data: bytes) -> bytes:
    """Return the name of a profile: 16 bytes of BLAKE2b over its file."""
    return hashlib.blake2b(data, digest_size=16).digest()
