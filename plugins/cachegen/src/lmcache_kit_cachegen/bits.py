"""The dtypes that can be quantised, between their bits and float32."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache_kit.layout import DTYPE_BYTES
from lmcache_kit_cachegen import kernels
from lmcache_kit_cachegen.tables import F32

Bits: TypeAlias = npt.NDArray[np.unsignedinteger]

# Twice the largest relative error of rounding to the dtype.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-20}


def bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger]:
    """Unsigned integers as wide as a value."""
    return np.dtype(f"<u{DTYPE_BYTES[dtype]}")


def widen(words: Bits, dtype: str) -> F32:
    """A new array of the values."""
    if dtype == "bfloat16":
        bits = np.empty(words.shape, np.uint32)
        kernels.widen(words, bits)
        return bits.view(np.float32)
    if dtype == "float16":
        return words.view("<f2").astype(np.float32)
    return words.view("<f4").astype(np.float32)


def rounded(values: F32, dtype: str) -> F32:
    """As :func:`narrow` and :func:`widen` make it; may be the same memory."""
    if dtype == "bfloat16":
        kernels.round_to_bfloat16(values.view(np.uint32))
    elif dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype("<f2").astype(np.float32)
    return values


def narrow(values: F32, dtype: str, words: Bits) -> None:
    """Round to nearest, ties to even. What is too large becomes an infinity."""
    if dtype == "bfloat16":
        kernels.narrow(values.view(np.uint32), words)
    elif dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            words.view("<f2")[:] = values
    else:
        words.view("<f4")[:] = values
