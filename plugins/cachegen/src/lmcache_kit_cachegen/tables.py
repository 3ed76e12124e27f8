"""Static frequency tables of the entropy coder, integers only.

Encoder and decoder need the same tables on every machine. The tables are therefore literals, and
their hash is in every blob. Table 0 (``ZERO_TABLE``) has one symbol, 0, which costs no bits:
constant channels use it, and columns that pad a row. All other tables come from ``_table_data.py``.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache_kit_cachegen._table_data import FREQUENCIES

TOTAL_BITS = 11
TOTAL = 1 << TOTAL_BITS
LARGEST = 15
SYMBOLS = 32
ESCAPE = 31
ZERO_TABLE = 0
TABLES = 1 + len(FREQUENCIES)
_STEPS_PER_OCTAVE = 4
_FIRST_OCTAVE = 5

U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]
F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]


def _frequencies() -> npt.NDArray[np.int64]:
    """Return ``[table, symbol]``; symbol ``s`` is the value ``s - 15``, the last is the escape."""
    found = np.zeros((TABLES, SYMBOLS), np.int64)
    found[ZERO_TABLE, LARGEST] = TOTAL
    half = np.array(FREQUENCIES, np.int64)
    found[1:, LARGEST : 2 * LARGEST + 1] = half[:, : LARGEST + 1]
    found[1:, :LARGEST] = half[:, LARGEST:0:-1]
    found[1:, ESCAPE] = half[:, LARGEST + 1]
    if not (found.sum(axis=1) == TOTAL).all():
        raise AssertionError("the frequencies of a table do not sum to the total")
    return found


def _decoding(frequencies: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> U32:
    """Return ``[table * TOTAL + slot]``: symbol | frequency << 8 | (slot - start) << 20."""
    counts = frequencies.ravel()
    symbols = np.repeat(np.tile(np.arange(SYMBOLS), TABLES), counts)
    within = np.tile(np.arange(TOTAL), TABLES) - np.repeat(starts.ravel(), counts)
    found: U32 = (symbols | np.repeat(counts, counts) << 8 | within << 20).astype(np.uint32)
    return found


FREQUENCY = _frequencies()
_STARTS = np.cumsum(FREQUENCY, axis=1) - FREQUENCY
TABLE_SET = hashlib.blake2b(FREQUENCY.astype("<u4").tobytes(), digest_size=8).digest()

ENCODING: U32 = (FREQUENCY | _STARTS << 16).astype(np.uint32).ravel()
"""``[table * SYMBOLS + symbol]``: frequency | start << 16."""
DECODING: U32 = _decoding(FREQUENCY, _STARTS)
RECIPROCAL = (((1 << 43) + FREQUENCY - 1) // np.maximum(FREQUENCY, 1)).astype(np.uint64).ravel()
"""``[table * SYMBOLS + symbol]``: ``x * this >> 43`` is ``x // frequency`` for every
``x < frequency << 20``, and its product fits 64 bits."""
_OCTAVES = (np.arange(TABLES - 2) + 0.5) / _STEPS_PER_OCTAVE - _FIRST_OCTAVE
THRESHOLDS = np.exp2(_OCTAVES).astype(np.float32)
"""Mean absolute values from which on the next table codes in fewer bits; used by encoders only."""
MAX_SYMBOL = np.array([np.flatnonzero(row[:ESCAPE])[-1] - LARGEST for row in FREQUENCY], np.int32)
"""``[table]``: the largest value that has a symbol; larger values are escaped."""


def expected_sizes(tables: U8) -> F64:
    """Return the mean absolute value of the symbols that each table is made for."""
    sizes: F64 = np.exp2((tables.astype(np.float64) - 1) / _STEPS_PER_OCTAVE - _FIRST_OCTAVE)
    return sizes
