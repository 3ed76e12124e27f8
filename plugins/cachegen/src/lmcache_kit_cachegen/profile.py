"""Profiles: what is known of a model's KV before a chunk is seen.

Measured once per model, from text. A chunk that is coded with a profile takes its steps from
there, coarse where the model hardly notices; a short one takes its means and tables from there
too, and then needs no side information at all. The file is msgpack, checked field by field when
it is read; its hash names it in the bitstream.
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
from lmcache_kit_cachegen.rope import same_rotation
from lmcache_kit_cachegen.tables import BETWEEN, F32, F64, TABLES, U8, expected_sizes

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
    """``[slices, columns]`` each. ``steps`` are those of level 2. ``expected``: per slice, the
    mean size of a symbol."""

    steps: F32
    means: F32
    tables: U8
    expected: F64


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """``steps``, ``means``: little-endian float32 ``[layers, 2, kv_heads, head_dim]``, in the
    domain without rotation. ``tables``: uint8 of the same shape, one after the other for levels
    1, 2, 3."""

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
        """16 bytes, the hash of its file."""
        return digest(self.to_bytes())

    def fits(self, chunk: ChunkInfo) -> bool:
        """Whether it is of this chunk's model, as far as shapes and rotation tell."""
        layout = chunk.layout
        return (
            layout.kind == "kv"
            and (layout.layers, layout.head_dim) == (self.layers, self.head_dim)
            and chunk.first_head + layout.kv_heads <= self.kv_heads
            and same_rotation(chunk.rope, self.rope)
        )

    def of(self, chunk: ChunkInfo, level: int) -> SliceProfile:
        """All slices of a chunk that it fits."""
        steps, means, tables = self._arrays
        heads = slice(chunk.first_head, chunk.first_head + chunk.layout.kv_heads)
        slices = 2 * self.layers

        def cut(array: npt.NDArray[S]) -> npt.NDArray[S]:
            return np.ascontiguousarray(array[:, :, heads]).reshape(slices, -1)

        chosen = cut(tables[level - 1])
        expected = expected_sizes(chosen).mean(axis=1)
        return SliceProfile(cut(steps), cut(means), chosen, expected)

    @cached_property
    def _arrays(self) -> tuple[F32, F32, U8]:
        shape = (self.layers, 2, self.kv_heads, self.head_dim)
        steps = np.frombuffer(self.steps, "<f4").reshape(shape).astype(np.float32)
        means = np.frombuffer(self.means, "<f4").reshape(shape).astype(np.float32)
        tables = np.frombuffer(self.tables, np.uint8).reshape(_LOSSY_LEVELS, *shape)
        if not (np.isfinite(steps).all() and np.isfinite(means).all() and (steps > 0).all()):
            raise ValueError("its steps and means are not all usable numbers")
        if not ((tables > 0) & (tables < TABLES)).all():
            raise ValueError("it names tables that do not exist")
        return steps, means, tables


def build_profile(
    model: str, rope: Rope | None, mean: F64, deviation: F64, sensitivity: F64
) -> Profile:
    """From what was measured, ``[layers, 2, kv_heads, head_dim]`` each.

    For a given size, the sum of errors times sensitivities is least when steps go with
    ``sensitivity ** -0.5``. The exponent is less here, since sensitivities are estimates, and no
    step goes too far from what it would be without a profile.
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
        [best_table(float(size), BETWEEN) for size in _coarse(sizes / steps, level).ravel()]
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
    """Mean absolute symbols at a level, from mean absolute values in steps of level 2."""
    return sizes * LEVELS[DEFAULT].step / level.step / (1 << level.shift)


def parse_profile(data: bytes) -> Profile:
    """Raises ValueError for anything but a complete profile of this version."""
    try:
        profile = msgspec.msgpack.decode(data, type=Profile)
    except msgspec.MsgspecError as error:
        raise ValueError(f"it is not a profile: {error}") from error
    if (profile.format, profile.version) != (FORMAT, VERSION):
        raise ValueError(
            f"it is {profile.format!r} version {profile.version}; known: {FORMAT!r} {VERSION}"
        )
    if profile.to_bytes() != data:
        raise ValueError("it is not written as profiles are")
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
