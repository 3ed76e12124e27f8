"""Conversion between float32 and the bits of the dtypes that can be quantised."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache_kit.layout import DTYPE_BYTES
from lmcache_kit_cachegen import kernels
from lmcache_kit_cachegen.tables import F32

Bits: TypeAlias = npt.NDArray[np.unsignedinteger]

# Twice the largest relative error of rounding to each dtype.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-20}


def bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger]:
    """Return the unsigned integer dtype of a value's width."""
    return np.dtype(f"<u{DTYPE_BYTES[dtype]}")


def widen(words: Bits, dtype: str) -> F32:
    """Convert bits of ``dtype`` to a new float32 array."""
    if dtype == "bfloat16":
        bits = np.empty(words.shape, np.uint32)
        kernels.widen(words, bits)
        return bits.view(np.float32)
    if dtype == "float16":
        return words.view("<f2").astype(np.float32)
    return words.view("<f4").astype(np.float32)


def rounded(values: F32, dtype: str) -> F32:
    """Round to ``dtype`` and back to float32; may work in place."""
    if dtype == "bfloat16":
        kernels.round_to_bfloat16(values.view(np.uint32))
    elif dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return values.astype("<f2").astype(np.float32)
    return values


def narrow(values: F32, dtype: str, words: Bits) -> None:
    """Convert float32 to bits of ``dtype``: nearest, ties to even; overflow becomes infinity."""
    if dtype == "bfloat16":
        kernels.narrow(values.view(np.uint32), words)
    elif dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            words.view("<f2")[:] = values
    else:
        words.view("<f4")[:] = values
