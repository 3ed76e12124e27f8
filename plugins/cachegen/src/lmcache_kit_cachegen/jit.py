"""numba, with a cache on disk where there is a folder for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from numba import njit  # type: ignore[import-untyped]

P = ParamSpec("P")
R = TypeVar("R")
_OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call; the machine's next process loads what this one compiled."""
    try:
        compiled: Callable[P, R] = njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # numba found no folder that it may write to
        compiled = njit(function, **_OPTIONS)
    return compiled
