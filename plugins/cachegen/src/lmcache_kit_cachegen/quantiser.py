"""Quantisation of slices (one layer's K or V of a chunk) to steps, with the error bound checked."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache_kit_cachegen import kernels, rans
from lmcache_kit_cachegen.bits import ROUNDING, Bits, rounded, widen
from lmcache_kit_cachegen.bitstream import Coder
from lmcache_kit_cachegen.levels import DEFAULT, LEVELS, Level
from lmcache_kit_cachegen.profile import SliceProfile
from lmcache_kit_cachegen.tables import F32, THRESHOLDS, U8

I16: TypeAlias = npt.NDArray[np.int16]

LARGEST_EXPONENT = 120 * 16
_STEPS_PER_OCTAVE = 16
_MIN_NONZERO = 1 / 16
_MAX_PROFILE_MISMATCH = 2.0


class BoundExceeded(Exception):
    """A slice cannot be quantised within the error bound, or saves nothing: store it losslessly."""


class StreamParameters(NamedTuple):
    """Parameters that all streams of a chunk share.

    ``cosines`` and ``sines`` are ``[tokens, pairs]``, or None where K has no known rope.
    ``interleaved``: rotated pairs are neighbours ("gptj"), else half a head apart ("neox").
    ``profile`` covers all slices, or is None.
    """

    dtype: str
    level: int
    coder: Coder
    tokens: int
    columns: int
    head_dim: int
    cosines: F32 | None
    sines: F32 | None
    interleaved: bool
    profile: SliceProfile | None

    @property
    def level_settings(self) -> Level:
        return LEVELS[self.level]

    @property
    def padded(self) -> int:
        """Columns, padded to a multiple of the coder's states."""
        return -(-self.columns // rans.STATES) * rans.STATES

    def has_rope(self, number: int) -> bool:
        return self.cosines is not None and number % 2 == 0

    def rotate(self, values: F32, sign: float) -> None:
        assert self.cosines is not None
        assert self.sines is not None
        kernels.rotate(values, self.cosines, self.sines, self.head_dim, self.interleaved, sign)

    @property
    def required_profile(self) -> SliceProfile:
        """The profile. Only for chunks that have one."""
        assert self.profile is not None
        return self.profile

    def profile_scale(self, number: int) -> F32:
        """Return the steps of a slice's columns from the profile."""
        factor = np.float32(self.level_settings.step / LEVELS[DEFAULT].step)
        scale: F32 = self.required_profile.steps[number] * factor
        return scale


class Slice(NamedTuple):
    """A quantised slice.

    ``steps`` is ``[tokens, columns]``; ``mean_steps`` and ``tables`` have an entry per column.
    ``exponent`` gives the size of a step where no profile does; see :func:`step`.
    """

    exponent: int
    mean_table: int
    mean_steps: I16
    steps: I16
    tables: U8


def mean_bits(tokens: int) -> int:
    """Return the number of fractional bits of a mean, which pay off when many tokens share it."""
    return 2 if tokens >= 128 else 1 if tokens >= 32 else 0


def step(exponent: int, columns: int) -> F32:
    """Return the step of each column: ``2 ** (exponent / 16)``."""
    return np.full(columns, 2.0 ** (exponent / _STEPS_PER_OCTAVE), np.float32)


def quantise(
    words: Bits, number: int, params: StreamParameters, *, profiled: bool, own_statistics: bool
) -> Slice:
    """Quantise slice ``number``, ``[tokens, columns]``.

    ``profiled`` takes the steps from the profile. ``own_statistics`` derives means and tables from
    the slice itself. Raises BoundExceeded.
    """
    original = widen(words, params.dtype)
    values = original.copy()
    if params.has_rope(number):
        params.rotate(values, -1.0)
    mean = np.empty(params.columns, np.float32)
    variance = np.empty(params.columns, np.float32)
    kernels.moments(values, mean, variance)
    deviation = _deviation(variance, params.tokens)
    exponent = 0 if profiled else _exponent(params.level_settings.step * deviation)
    scale = params.profile_scale(number) if profiled else step(exponent, params.columns)
    mean_steps = np.empty(params.columns, np.int16)
    mean_table = 0
    if own_statistics:
        fine = mean_bits(params.tokens)
        mean_table = kernels.round_means(mean, scale, fine, THRESHOLDS, mean_steps)
    else:
        mean = params.required_profile.means[number]
    steps = np.empty(values.shape, np.int16)
    sizes = np.empty(params.columns, np.float32)
    nonzero = kernels.quantise(values, mean, scale, params.level_settings.shift, steps, sizes)
    if mean_table < 0 or nonzero < 0:
        raise BoundExceeded
    if profiled:
        _check_profile_fit(sizes, number, params)
    elif params.tokens > 8 and nonzero < steps.size * _MIN_NONZERO:
        raise BoundExceeded  # a few outliers set the step; all other values would become 0
    _check_bound(original, values, number, scale, params)
    if not own_statistics:
        return Slice(
            exponent, mean_table, mean_steps, steps, params.required_profile.tables[number]
        )
    tables = np.empty(params.columns, np.uint8)
    kernels.choose_tables(sizes, THRESHOLDS, tables)
    return Slice(exponent, mean_table, mean_steps, steps, tables)


def _deviation(variance: F32, tokens: int) -> float:
    """Return the standard deviation around the channels' means; 0 for a single token."""
    found = float(np.add.reduce(variance, dtype=np.float64)) / len(variance)
    if not math.isfinite(found):
        raise BoundExceeded
    return math.sqrt(found * tokens / (tokens - 1)) if tokens > 1 else 0.0


def _exponent(original: float) -> int:
    if original <= 0:
        raise BoundExceeded
    exponent = round(_STEPS_PER_OCTAVE * math.log2(original))
    if abs(exponent) > LARGEST_EXPONENT:
        raise BoundExceeded
    return exponent


def _check_profile_fit(sizes: F32, number: int, params: StreamParameters) -> None:
    """Raise BoundExceeded for a chunk that is too unlike the text of the profile."""
    if (
        np.add.reduce(sizes) / len(sizes)
        > _MAX_PROFILE_MISMATCH * params.required_profile.expected[number]
    ):
        raise BoundExceeded


def _check_bound(
    original: F32, got: F32, number: int, scale: F32, params: StreamParameters
) -> None:
    """Raise BoundExceeded unless every decoded value is within half a step of the original.

    A rotation mixes the errors of a pair, which allows the root of two more. Rounding to the dtype
    comes on top.
    """
    rounding = ROUNDING[params.dtype]
    bound = scale * np.float32(0.5 * (1 + rounding))
    if params.has_rope(number):
        params.rotate(got, 1.0)
        bound = np.full(params.columns, bound.max() * np.float32(math.sqrt(2)), np.float32)
    if kernels.violations(original, rounded(got, params.dtype), bound, rounding):
        raise BoundExceeded
