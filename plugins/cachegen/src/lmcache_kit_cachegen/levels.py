"""Quantisation settings of the levels 0 to 3."""

from __future__ import annotations

from typing import NamedTuple


class Level(NamedTuple):
    """Settings of one level.

    ``step`` is the quantisation step in standard deviations of a slice around its channels' means.
    ``shift`` is the number of low bits of a quantised value that are stored without entropy coding.
    """

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
"""Tokens at the start of a sequence that are kept losslessly, since they are attention sinks: an
error in the first token would outweigh all other errors together."""
