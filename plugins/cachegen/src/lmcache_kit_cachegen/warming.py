"""What the first calls of a process would otherwise wait for."""

from __future__ import annotations

import numpy as np

from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import KVLayout
from lmcache_kit_cachegen.levels import NEAR_LOSSLESS
from lmcache_kit_cachegen.options import CacheGenOptions


def exercise(options: CacheGenOptions) -> None:
    """Encode and decode a little of everything, so that each kernel gets compiled or loaded."""
    from lmcache_kit_cachegen.codec import CacheGenCodec

    layout = KVLayout("bfloat16", layers=1, kv_heads=1, head_dim=8)
    chunk = ChunkInfo(layout, tokens=64, start=8, rope=Rope(rotary_dim=8))
    values = np.random.default_rng(0).normal(size=chunk.payload_bytes // 2).astype(np.float32)
    payload = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    out = bytearray(chunk.payload_bytes)
    for level in {options.level, NEAR_LOSSLESS}:
        codec = CacheGenCodec(CacheGenOptions(level=level))
        for data in (payload, bytearray(payload)):  # numba tells read-only memory from other
            codec.decode(codec.encode(data, chunk), chunk, out)
