"""Chunks of made-up KV that looks like real KV, and a codec that is warm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lmcache_kit_cachegen.codec import CacheGenCodec
from lmcache_kit_cachegen.options import CacheGenOptions
from lmcache_kit_cachegen.profile import Profile, build_profile
from lmcache_kit_cachegen.rope import cosines_and_sines

from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import KVLayout

ROPE = Rope(rotary_dim=16, base=10000.0)


def layout(dtype: str = "bfloat16", layers: int = 2, heads: int = 2, width: int = 16) -> KVLayout:
    return KVLayout(dtype, layers, heads, width)


def to_words(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values' bits, rounded to the dtype."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4").view(
        "<u2" if dtype == "float16" else "<u4"
    )


def to_values(payload: Any, chunk: ChunkInfo) -> np.ndarray:
    """``[layers, 2, tokens, heads, width]`` as float64."""
    dtype = chunk.layout.dtype
    if dtype == "bfloat16":
        values = (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(payload, "<f2" if dtype == "float16" else "<f4")
    shape = (chunk.layout.layers, 2, chunk.tokens, chunk.layout.kv_heads, chunk.layout.head_dim)
    return values.astype(np.float64).reshape(shape)


def channels(chunk: ChunkInfo, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Means and sizes of the channels of a made-up model, ``[layers, 2, heads, width]``."""
    random = np.random.default_rng(seed)
    shape = (chunk.layout.layers, 2, chunk.layout.kv_heads, chunk.layout.head_dim)
    return random.normal(0, 2, shape), np.exp(random.normal(0, 0.5, shape))


def like_kv(chunk: ChunkInfo, seed: int = 0) -> np.ndarray:
    """Channels with a mean and a size of their own, K turned."""
    mean, size = channels(chunk)
    random = np.random.default_rng(seed + 1)
    shape = (chunk.layout.layers, 2, chunk.tokens, chunk.layout.kv_heads, chunk.layout.head_dim)
    values = random.normal(0, 1, shape) * size[:, :, None] + mean[:, :, None]
    if chunk.rope is not None:
        cosines, sines = (
            part[:, None] for part in cosines_and_sines(chunk.rope, chunk.start, chunk.tokens)
        )
        half = chunk.rope.rotary_dim // 2
        near = chunk.rope.style == "gptj"
        one = np.arange(0, 2 * half, 2) if near else np.arange(half)
        other = one + (1 if near else half)
        k = values[:, 0].copy()
        values[:, 0][..., one] = k[..., one] * cosines - k[..., other] * sines
        values[:, 0][..., other] = k[..., other] * cosines + k[..., one] * sines
    return values


def payload_of(chunk: ChunkInfo, seed: int = 0) -> bytes:
    return to_words(like_kv(chunk, seed), chunk.layout.dtype).tobytes()


def round_trip(codec: CacheGenCodec, payload: Any, chunk: ChunkInfo) -> tuple[bytes, bytes]:
    """The blob, and what it decodes to."""
    blob = codec.encode(payload, chunk)
    out = bytearray(b"\xa5" * chunk.payload_bytes)
    codec.decode(blob, chunk, out)
    return blob, bytes(out)


@pytest.fixture(scope="session")
def codec_of() -> Callable[..., CacheGenCodec]:
    """Codecs by options, each made once."""
    made: dict[Any, CacheGenCodec] = {}

    def get(level: int = 2, **options: Any) -> CacheGenCodec:
        wanted = CacheGenOptions(level=level, **options)
        if wanted not in made:
            made[wanted] = CacheGenCodec(wanted)
        return made[wanted]

    get().warm_up()
    return get


@pytest.fixture(scope="session")
def profile() -> Profile:
    """Of the made-up model."""
    chunk = ChunkInfo(layout(), tokens=1, rope=ROPE)
    mean, size = channels(chunk)
    return build_profile("made-up", ROPE, mean, size, np.ones_like(mean) / size.mean() ** 2)
