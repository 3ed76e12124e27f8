"""How coarse each level is."""

from __future__ import annotations

from typing import NamedTuple


class Level(NamedTuple):
    """``step``: in standard deviations of a slice around its channels' means. ``shift``: how many
    bits of a quantised value are stored as they are, below what is entropy-coded."""

    name: str
    step: float
    shift: int


LOSSLESS, NEAR_LOSSLESS, DEFAULT, COMPACT = range(4)
LEVELS = (
    Level("lossless", 0.0, 0),
    Level("near-lossless", 0.1, 3),
    Level("default", 0.56, 0),
    Level("compact", 0.9, 0),
)

SINK_TOKENS = 1
"""Kept bit by bit at the start of a sequence: attention leans on the first token so much that
its error would outweigh all others together."""
