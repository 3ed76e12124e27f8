"""Angles of a rotary embedding (RoPE)."""

from __future__ import annotations

import numpy as np

from lmcache_kit.interfaces import Rope
from lmcache_kit_cachegen.tables import F32


def cosines_and_sines(rope: Rope, start: int, count: int) -> tuple[F32, F32]:
    """Return cosines and sines, ``[count, pairs]`` each, for positions from ``start`` on."""
    positions = np.arange(start, start + count, dtype=np.float64)
    angles = positions[:, None] * np.array(rope.frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def is_same_rope(one: Rope | None, other: Rope | None) -> bool:
    """Whether both describe the same rotation, given by a base or by listed frequencies."""
    if one is None or other is None:
        return one is other
    if (one.rotary_dim, one.style) != (other.rotary_dim, other.style):
        return False
    return np.allclose(one.frequencies, other.frequencies, rtol=1e-5, atol=0)
