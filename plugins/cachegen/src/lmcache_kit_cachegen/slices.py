"""Slices in steps: one layer's K or V of a chunk, quantised, with its bound checked."""

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
from lmcache_kit_cachegen.tables import BETWEEN, F32, U8

I16: TypeAlias = npt.NDArray[np.int16]

LARGEST_EXPONENT = 120 * 16
_STEPS_PER_OCTAVE = 16
_FEWEST_NONZERO = 1 / 16
_SURPRISE = 2.0


class NotHeld(Exception):
    """A slice cannot be quantised within the bound, or not sensibly: it is to be lossless."""


class Plan(NamedTuple):
    """What all streams of a chunk have in common. ``cosines``, ``sines``: ``[tokens, pairs]``, or
    None where K is not rotated; ``near``: pairs are neighbours. ``profile``: of all slices."""

    dtype: str
    level: int
    coder: Coder
    tokens: int
    columns: int
    head_dim: int
    cosines: F32 | None
    sines: F32 | None
    near: bool
    profile: SliceProfile | None

    @property
    def parameters(self) -> Level:
        return LEVELS[self.level]

    @property
    def padded(self) -> int:
        """Columns, filled up to a multiple of the coder's states."""
        return -(-self.columns // rans.STATES) * rans.STATES

    def is_rotated(self, number: int) -> bool:
        return self.cosines is not None and number % 2 == 0

    def rotate(self, values: F32, sign: float) -> None:
        assert self.cosines is not None
        assert self.sines is not None
        kernels.rotate(values, self.cosines, self.sines, self.head_dim, self.near, sign)

    @property
    def known(self) -> SliceProfile:
        """The profile, where there is one."""
        assert self.profile is not None
        return self.profile

    def profile_scale(self, number: int) -> F32:
        """Steps of a slice, from the profile."""
        factor = np.float32(self.parameters.step / LEVELS[DEFAULT].step)
        scale: F32 = self.known.steps[number] * factor
        return scale


class Slice(NamedTuple):
    """A slice in steps: ``[tokens, columns]``, and per column the steps of its mean and its
    table. ``exponent`` says how large a step is, where no profile does."""

    exponent: int
    mean_table: int
    mean_steps: I16
    steps: I16
    tables: U8


def mean_bits(tokens: int) -> int:
    """Fine bits of a mean, in parts of a step; they pay off when many tokens share it."""
    return 2 if tokens >= 128 else 1 if tokens >= 32 else 0


def step(exponent: int, columns: int) -> F32:
    """Steps are powers of the sixteenth root of two, the same for each column."""
    return np.full(columns, 2.0 ** (exponent / _STEPS_PER_OCTAVE), np.float32)


def quantise(words: Bits, number: int, plan: Plan, *, profiled: bool, own: bool) -> Slice:
    """``profiled``: take the steps from the profile; ``own``: find means and tables in the slice
    itself. Raises NotHeld."""
    wanted = widen(words, plan.dtype)
    values = wanted.copy()
    if plan.is_rotated(number):
        plan.rotate(values, -1.0)
    mean = np.empty(plan.columns, np.float32)
    variance = np.empty(plan.columns, np.float32)
    kernels.moments(values, mean, variance)
    deviation = _deviation(variance, plan.tokens)
    exponent = 0 if profiled else _exponent(plan.parameters.step * deviation)
    scale = plan.profile_scale(number) if profiled else step(exponent, plan.columns)
    mean_steps = np.empty(plan.columns, np.int16)
    mean_table = 0
    if own:
        fine = mean_bits(plan.tokens)
        mean_table = kernels.round_means(mean, scale, fine, BETWEEN, mean_steps)
    else:
        mean = plan.known.means[number]
    steps = np.empty(values.shape, np.int16)
    sizes = np.empty(plan.columns, np.float32)
    filled = kernels.quantise(values, mean, scale, plan.parameters.shift, steps, sizes)
    if mean_table < 0 or filled < 0:
        raise NotHeld
    if profiled:
        _check_surprise(sizes, number, plan)
    elif plan.tokens > 8 and filled < steps.size * _FEWEST_NONZERO:
        raise NotHeld  # a few outliers made the step; all else would be lost
    _check_bound(wanted, values, number, scale, plan)
    if not own:
        return Slice(exponent, mean_table, mean_steps, steps, plan.known.tables[number])
    tables = np.empty(plan.columns, np.uint8)
    kernels.choose_tables(sizes, BETWEEN, tables)
    return Slice(exponent, mean_table, mean_steps, steps, tables)


def _deviation(variance: F32, tokens: int) -> float:
    """Standard deviation around the channels' means; one token has none."""
    found = float(np.add.reduce(variance, dtype=np.float64)) / len(variance)
    if not math.isfinite(found):
        raise NotHeld
    return math.sqrt(found * tokens / (tokens - 1)) if tokens > 1 else 0.0


def _exponent(wanted: float) -> int:
    if wanted <= 0:
        raise NotHeld
    exponent = round(_STEPS_PER_OCTAVE * math.log2(wanted))
    if abs(exponent) > LARGEST_EXPONENT:
        raise NotHeld
    return exponent


def _check_surprise(sizes: F32, number: int, plan: Plan) -> None:
    """A chunk that is nothing like the profile's text is better off without the profile."""
    if np.add.reduce(sizes) / len(sizes) > _SURPRISE * plan.known.expected[number]:
        raise NotHeld


def _check_bound(wanted: F32, got: F32, number: int, scale: F32, plan: Plan) -> None:
    """Whether what a decoder will see is within half a step of every value.

    A rotation mixes the errors of a pair; rounding to the dtype comes on top.
    """
    rounding = ROUNDING[plan.dtype]
    bound = scale * np.float32(0.5 * (1 + rounding))
    if plan.is_rotated(number):
        plan.rotate(got, 1.0)
        bound = np.full(plan.columns, bound.max() * np.float32(math.sqrt(2)), np.float32)
    if kernels.violations(wanted, rounded(got, plan.dtype), bound, rounding):
        raise NotHeld
