"""Chunks and payloads for tests of codecs, in plain Python."""

from __future__ import annotations

import random
import struct
from functools import lru_cache

from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.interfaces.codec import Buffer
from lmcache_kit.layout import DTYPE_BYTES, KVLayout

ROPE = Rope(rotary_dim=16)
LAYOUTS = (
    *(KVLayout(dtype, layers=2, kv_heads=2, head_dim=16) for dtype in DTYPE_BYTES),
    KVLayout("bfloat16", layers=3, kv_heads=1, head_dim=40, kind="mla"),
)
"""Layouts of every dtype and of both kinds."""

_CHANNELS = 64
_SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -6e-8, 65504.0, 1.0)


def chunk_of(layout: KVLayout, tokens: int = 24, start: int = 256) -> ChunkInfo:
    """Return a chunk; one of kind "kv" has a rotary embedding in its K."""
    rope = ROPE if layout.kind == "kv" and layout.head_dim >= ROPE.rotary_dim else None
    return ChunkInfo(layout, tokens, start, rope)


def shown(layout: KVLayout) -> str:
    """Return an id of the layout for parametrized tests."""
    return f"{layout.kind}-{layout.dtype}"


def kv_like(chunk: ChunkInfo, seed: int = 0) -> bytes:
    """Return finite values whose channels have means and sizes of their own, as KV has."""
    draw = random.Random(seed)
    size = DTYPE_BYTES[chunk.layout.dtype]
    if size == 1:
        finite = bytes(each for each in range(256) if each & 0x7F < 0x70)
        return bytes(draw.choices(finite, k=chunk.payload_bytes))
    channels = [(draw.gauss(0, 2), draw.uniform(0.2, 2)) for _ in range(_CHANNELS)]
    count = min(chunk.payload_bytes // size, 64 * _CHANNELS)
    block = pack([draw.gauss(*channels[i % _CHANNELS]) for i in range(count)], chunk.layout.dtype)
    return _filled(block, chunk.payload_bytes)


def random_bits(chunk: ChunkInfo, seed: int = 0) -> bytes:
    """Return random bits: mostly huge, tiny and special values."""
    return random.Random(seed).randbytes(chunk.payload_bytes)


def special(chunk: ChunkInfo, seed: int = 0) -> bytes:
    """Return KV with some NaN, infinities, zeros and denormals in it."""
    draw = random.Random(seed)
    payload, size = bytearray(kv_like(chunk, seed)), DTYPE_BYTES[chunk.layout.dtype]
    for value in _SPECIAL * 3:
        at = draw.randrange(chunk.payload_bytes // size) * size
        word = draw.randbytes(1) if size == 1 else pack([value], chunk.layout.dtype)
        payload[at : at + size] = word
    return bytes(payload)


def constant(chunk: ChunkInfo, value: float = 0.0) -> bytes:
    """Return one value everywhere; for fp8, ``int(value)`` as the bits."""
    dtype = chunk.layout.dtype
    word = bytes([int(value) & 0xFF]) if DTYPE_BYTES[dtype] == 1 else pack([value], dtype)
    return _filled(word, chunk.payload_bytes)


def slices_of(payload: Buffer, chunk: ChunkInfo) -> list[memoryview]:
    """Split a payload into slices: one layer's K or V each."""
    count = chunk.layout.layers * (2 if chunk.layout.kind == "kv" else 1)
    view, step = memoryview(payload).cast("B"), chunk.payload_bytes // count
    return [view[at : at + step] for at in range(0, chunk.payload_bytes, step)]


def pack(values: list[float], dtype: str) -> bytes:
    """Encode values in a dtype of 16 or 32 bits; bfloat16 is truncated, not rounded."""
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    raw = struct.pack(f"<{len(values)}f", *values)
    if dtype == "float32":
        return raw
    cut = bytearray(2 * len(values))
    cut[0::2], cut[1::2] = raw[2::4], raw[3::4]
    return bytes(cut)


def values_of(data: Buffer, dtype: str) -> tuple[float, ...]:
    """Decode bytes of ``dtype`` to numbers."""
    raw = bytes(data)
    size = DTYPE_BYTES[dtype]
    if size == 1:
        table = _fp8(dtype)
        return tuple(table[each] for each in raw)
    if dtype == "bfloat16":
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
        raw, size = bytes(wide), 4
    code = "e" if dtype == "float16" else "f"
    return struct.unpack(f"<{len(raw) // size}{code}", raw)


def _filled(block: bytes, nbytes: int) -> bytes:
    return (block * -(-nbytes // len(block)))[:nbytes]


@lru_cache
def _fp8(dtype: str) -> tuple[float, ...]:
    """Return the values of all 256 bytes.

    e5m2 is the upper half of float16; e4m3 has no infinity and one NaN.
    """
    if dtype == "float8_e5m2":
        return tuple(struct.unpack("<e", bytes([0, byte]))[0] for byte in range(256))
    values = []
    for byte in range(256):
        sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
        if exponent == 15 and fraction == 7:
            values.append(float("nan"))
        elif exponent:
            values.append(sign * (1 + fraction / 8) * 2.0 ** (exponent - 7))
        else:
            values.append(sign * fraction / 8 * 2.0**-6)
    return tuple(values)
