"""Profiles: steps, means and tables of a model's KV, measured once per model, from text.

A chunk that is coded with a profile takes its steps from the profile: coarse where the model hardly
notices. A short chunk takes its means and tables from the profile too, and then needs no side
information at all. The file is msgpack, validated field by field when it is read; its hash names
the profile in the bitstream.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from lmcache_kit.errors import ConfigError
from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit_cachegen.bitstream import digest
from lmcache_kit_cachegen.kernels import best_table
from lmcache_kit_cachegen.levels import DEFAULT, LEVELS, Level
from lmcache_kit_cachegen.rope import is_same_rope
from lmcache_kit_cachegen.tables import F32, F64, TABLES, THRESHOLDS, U8, expected_sizes

FORMAT = "lmcache-kit-cachegen-profile"
VERSION = 1
MAX_FILE_BYTES = 256 << 20
S = TypeVar("S", bound=np.generic)
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_LOSSY_LEVELS = len(LEVELS) - 1
_STEP = 0.72
_EXPONENT = 0.4
_WEIGHTS = (0.15, 3.0)
_SIZE_OF_DEVIATION = 0.78
"""Mean absolute value over standard deviation, between those of normal and logistic values."""


class SliceProfile(NamedTuple):
    """Profile of all slices of a rank at one level.

    ``steps`` (of level 2), ``means`` and ``tables`` are ``[slices, columns]``. ``expected`` is the
    mean absolute symbol of each slice.
    """

    steps: F32
    means: F32
    tables: U8
    expected: F64


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Profile of a model, as its file holds it.

    ``steps`` and ``means`` are little-endian float32 ``[layers, 2, kv_heads, head_dim]``, with the
    rotation of K undone. ``tables`` is uint8 of the same shape, once for each of levels 1, 2, 3.
    """

    model: str
    layers: _Count
    kv_heads: _Count
    head_dim: _Count
    rope: Rope | None
    steps: bytes
    means: bytes
    tables: bytes
    format: str = FORMAT
    version: int = VERSION

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @cached_property
    def name(self) -> bytes:
        """Name of the profile: 16 bytes, the hash of its file."""
        return digest(self.to_bytes())

    def fits(self, chunk: ChunkInfo) -> bool:
        """Whether the profile is of this chunk's model, as far as shapes and rotation tell."""
        layout = chunk.layout
        return (
            layout.kind == "kv"
            and (layout.layers, layout.head_dim) == (self.layers, self.head_dim)
            and chunk.first_head + layout.kv_heads <= self.kv_heads
            and is_same_rope(chunk.rope, self.rope)
        )

    def slices_of(self, heads: slice, level: int) -> SliceProfile:
        """Return the profile of all slices of a rank that holds these KV heads."""
        steps, means, tables = self._arrays
        slices = 2 * self.layers

        def take_heads(array: npt.NDArray[S]) -> npt.NDArray[S]:
            return np.ascontiguousarray(array[:, :, heads]).reshape(slices, -1)

        chosen = take_heads(tables[level - 1])
        expected = expected_sizes(chosen).mean(axis=1)
        return SliceProfile(take_heads(steps), take_heads(means), chosen, expected)

    @cached_property
    def _arrays(self) -> tuple[F32, F32, U8]:
        shape = (self.layers, 2, self.kv_heads, self.head_dim)
        steps = np.frombuffer(self.steps, "<f4").reshape(shape).astype(np.float32)
        means = np.frombuffer(self.means, "<f4").reshape(shape).astype(np.float32)
        tables = np.frombuffer(self.tables, np.uint8).reshape(_LOSSY_LEVELS, *shape)
        if not (np.isfinite(steps).all() and np.isfinite(means).all() and (steps > 0).all()):
            raise ValueError("its steps are not all positive numbers, or its means not all finite")
        if not ((tables > 0) & (tables < TABLES)).all():
            raise ValueError(f"it names unknown tables; known are 1 to {TABLES - 1}")
        return steps, means, tables


def build_profile(
    model: str, rope: Rope | None, mean: F64, deviation: F64, sensitivity: F64
) -> Profile:
    """Build a profile from measurements, ``[layers, 2, kv_heads, head_dim]`` each.

    For a given size, the sum of errors times sensitivities is least when steps are proportional to
    ``sensitivity ** -0.5``. The exponent is smaller here, since sensitivities are estimates. No
    step goes further than a factor of 0.15 to 3 from the step without a profile.
    """
    layers, _, kv_heads, head_dim = mean.shape
    pooled = np.sqrt(np.square(deviation).mean(axis=(2, 3), keepdims=True))
    pooled = np.maximum(pooled, np.finfo(np.float32).tiny)
    known = np.maximum(sensitivity, sensitivity.max() * 1e-12 + np.finfo(np.float64).tiny)
    weights = known**-_EXPONENT / pooled
    weights = np.clip(weights / np.exp(np.log(weights).mean()), *_WEIGHTS)
    steps = (weights * pooled * _STEP).astype("<f4")
    sizes = deviation * _SIZE_OF_DEVIATION
    tables = [
        [best_table(float(size), THRESHOLDS) for size in _coarse(sizes / steps, level).ravel()]
        for level in LEVELS[1:]
    ]
    return Profile(
        model=model,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        steps=steps.tobytes(),
        means=mean.astype("<f4").tobytes(),
        tables=np.array(tables, np.uint8).tobytes(),
    )


def _coarse(sizes: F64, level: Level) -> F64:
    """Convert mean absolute values in steps of level 2 to mean absolute symbols at a level."""
    return sizes * LEVELS[DEFAULT].step / level.step / (1 << level.shift)


def parse_profile(data: bytes) -> Profile:
    """Parse a profile. Raises ValueError for anything but a complete profile of this version."""
    try:
        profile = msgspec.msgpack.decode(data, type=Profile)
    except msgspec.MsgspecError as error:
        raise ValueError(f"it is not a profile: {error}") from error
    if (profile.format, profile.version) != (FORMAT, VERSION):
        raise ValueError(
            f"it is {profile.format!r} version {profile.version}; known: {FORMAT!r} {VERSION}"
        )
    if profile.to_bytes() != data:
        raise ValueError("it is not encoded as profiles are")
    _ = profile._arrays
    return profile


def load_profile(path: str | Path) -> Profile:
    """Read a profile from a file. Raises ConfigError that names the file."""
    hint = "Make one with `lmcache-kit cachegen profile MODEL`"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror or error}", hint=hint) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"profile {path}: larger than {MAX_FILE_BYTES} bytes", hint=hint)
    try:
        return parse_profile(data)
    except ValueError as error:
        raise ConfigError(f"profile {path}: {error}", hint=hint) from error
