"""numba's compiler, with its cache on disk where a folder is writable."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from numba import njit  # type: ignore[import-untyped]
from numba.core.caching import FunctionCache  # type: ignore[import-untyped]

P = ParamSpec("P")
R = TypeVar("R")
_OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy"}

logger = logging.getLogger(__name__)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call, and cache the machine code on disk for later processes."""
    compiled: Any = njit(function, **_OPTIONS)
    with suppress(RuntimeError):  # numba found no writable folder for its cache
        # Instead of enable_caching(), which makes a cache whose errors are those of the call.
        compiled._cache = _OptionalCache(function)
    result: Callable[P, R] = compiled
    return result


class _OptionalCache(FunctionCache):  # type: ignore[misc]  # numba is untyped
    """A cache without which code still runs, where its folder is full or damaged."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except OSError as error:
            _log_once(self.cache_path, "read", error.strerror)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _log_once(self.cache_path, "written", error.strerror)


@functools.cache
def _log_once(folder: str, action: str, why: str) -> None:
    logger.warning(
        "numba's cache %s cannot be %s (%s): every process compiles anew; free space there, or "
        "set NUMBA_CACHE_DIR",
        folder,
        action,
        why,
    )
