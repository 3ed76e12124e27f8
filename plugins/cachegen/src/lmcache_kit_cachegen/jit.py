"""numba's compiler, with its cache on disk where a folder is writable."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from numba import njit  # type: ignore[import-untyped]

P = ParamSpec("P")
R = TypeVar("R")
_OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call, and cache the machine code on disk for later processes."""
    try:
        compiled: Callable[P, R] = njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # numba found no writable folder for its cache
        compiled = njit(function, **_OPTIONS)
    return compiled
