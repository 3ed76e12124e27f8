# ruff: noqa: PLR0917 - kernels take their arguments by position
"""Interleaved range asymmetric numeral systems (rANS; J. Duda, arXiv:1311.2540), eight states.

States have 31 bits and are renormalised by 16. Symbol ``i`` of a row belongs to state ``i % 8``.
All states share one sequence of words. The encoder writes the words backwards, so that the decoder
reads forwards. The static tables are in :mod:`lmcache_kit_cachegen.tables`.

A group is ``[slices, rows, columns]`` symbols. The first ``header_rows`` rows of a slice are its
header: row 0 has the tables of its columns, row 1 their means. A group without a header
(``header_rows == 0``) takes its tables from a profile.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lmcache_kit_cachegen.jit import jit
from lmcache_kit_cachegen.tables import LARGEST, SYMBOLS, TABLES, TOTAL, U8, U32, ZERO_TABLE

STATES = 8
FLUSH_WORDS = 2 * STATES
CORRUPT = -1
"""Return value of :func:`decode` for words that no encoder wrote."""

U16: TypeAlias = npt.NDArray[np.uint16]
I64: TypeAlias = npt.NDArray[np.int64]
U64: TypeAlias = npt.NDArray[np.uint64]

_u32 = np.uint32
_u64 = np.uint64
_one = _u64(1)
_LOW = _u32(1 << 15)


# Indices are unsigned: for signed ones numba adds a test whether they count from the end.


@jit
def _push(x, p, words, at, encoding, reciprocals):  # type: ignore[no-untyped-def]
    entry = encoding[at]
    frequency = _u32(entry & _u32(0xFFFF))
    full = (x >> _u32(20)) >= frequency
    words[p - _one] = np.uint16(x)
    p = _u64(p - _u64(full))
    x = _u32(x >> _u32(16)) if full else x
    quotient = _u32((_u64(x) * reciprocals[at]) >> _u64(43))
    return _u32((quotient << _u32(11)) + (x - quotient * frequency) + (entry >> _u32(16))), p


@jit
def _pop(x, p, words, decoding, table, symbols, at):  # type: ignore[no-untyped-def]
    entry = decoding[table + _u64(x & _u32(TOTAL - 1))]
    symbols[at] = np.uint8(entry)
    x = _u32(((entry >> _u32(8)) & _u32(0xFFF)) * (x >> _u32(11)) + (entry >> _u32(20)))
    empty = x < _LOW
    filled = _u32((x << _u32(16)) | _u32(words[p]))
    return (filled if empty else x), _u64(p + _u64(empty))


@jit
def fill_tables(row, base, first_row, tables):  # type: ignore[no-untyped-def]
    """Set the tables of a slice's columns from its row 0; return False for an unknown table."""
    for c in range(row.shape[0]):
        table = base + np.int64(row[c]) - LARGEST
        if first_row[c] == ZERO_TABLE:
            table = ZERO_TABLE
        if table < 0 or table >= TABLES:
            return False
        tables[c] = np.uint8(table)
    return True


@jit
def encode(
    symbols: U8, tables: U8, header_rows: int, encoding: U32, reciprocal: U64, words: U16
) -> int:
    """Fill ``words`` from its end; return the index of the first word.

    ``tables`` is ``[slices, header_rows + 1, columns]``: one row of tables per header row, and one
    for all other rows. ``words`` must have space for one word a symbol and :data:`FLUSH_WORDS` + 1
    more.
    """
    slices, rows, columns = symbols.shape
    p: Any = _u64(words.shape[0])
    t = np.empty(columns, np.uint64)
    x0 = x1 = x2 = x3 = x4 = x5 = x6 = x7 = _LOW
    for s in range(slices - 1, -1, -1):
        for r in range(rows - 1, -1, -1):
            v = symbols[s, r]
            if r >= rows - 1 or r < header_rows:
                for c in range(columns):
                    t[c] = _u64(tables[s, min(r, header_rows), c]) * _u64(SYMBOLS)
            for group in range(columns // STATES):
                at = _u64(columns - STATES - group * STATES)
                x7, p = _push(x7, p, words, t[at + _u64(7)] + v[at + _u64(7)], encoding, reciprocal)
                x6, p = _push(x6, p, words, t[at + _u64(6)] + v[at + _u64(6)], encoding, reciprocal)
                x5, p = _push(x5, p, words, t[at + _u64(5)] + v[at + _u64(5)], encoding, reciprocal)
                x4, p = _push(x4, p, words, t[at + _u64(4)] + v[at + _u64(4)], encoding, reciprocal)
                x3, p = _push(x3, p, words, t[at + _u64(3)] + v[at + _u64(3)], encoding, reciprocal)
                x2, p = _push(x2, p, words, t[at + _u64(2)] + v[at + _u64(2)], encoding, reciprocal)
                x1, p = _push(x1, p, words, t[at + _u64(1)] + v[at + _u64(1)], encoding, reciprocal)
                x0, p = _push(x0, p, words, t[at] + v[at], encoding, reciprocal)
    for x in (x7, x6, x5, x4, x3, x2, x1, x0):
        words[p - _one] = np.uint16(x)
        words[p - _u64(2)] = np.uint16(x >> _u32(16))
        p -= _u64(2)
    return int(p)


@jit
def decode(
    words: U16, count: int, tables: U8, bases: I64, header_rows: int, decoding: U32, symbols: U8
) -> int:
    """Decode ``count`` words into ``symbols``; return 0, or CORRUPT.

    ``words`` must be longer than ``count`` by a row's columns. ``bases`` holds, per slice, the
    table that the middle symbol of row 0 stands for. With header rows, row 0 fills
    ``tables[s, header_rows]``. Columns whose table is ZERO_TABLE in row 0 keep it.
    """
    slices, rows, columns = symbols.shape
    if count < FLUSH_WORDS:
        return CORRUPT
    offsets = np.empty(columns, np.uint64)
    x0 = (_u32(words[0]) << _u32(16)) | _u32(words[1])
    x1 = (_u32(words[2]) << _u32(16)) | _u32(words[3])
    x2 = (_u32(words[4]) << _u32(16)) | _u32(words[5])
    x3 = (_u32(words[6]) << _u32(16)) | _u32(words[7])
    x4 = (_u32(words[8]) << _u32(16)) | _u32(words[9])
    x5 = (_u32(words[10]) << _u32(16)) | _u32(words[11])
    x6 = (_u32(words[12]) << _u32(16)) | _u32(words[13])
    x7 = (_u32(words[14]) << _u32(16)) | _u32(words[15])
    p: Any = _u64(FLUSH_WORDS)
    for s in range(slices):
        for r in range(rows):
            if np.int64(p) > count:
                return CORRUPT
            if r <= header_rows:
                for c in range(columns):
                    offsets[c] = _u64(tables[s, r, c]) * _u64(TOTAL)
            v = symbols[s, r]
            for group in range(columns // STATES):
                at = _u64(group * STATES)
                x0, p = _pop(x0, p, words, decoding, offsets[at], v, at)
                x1, p = _pop(x1, p, words, decoding, offsets[at + _u64(1)], v, at + _u64(1))
                x2, p = _pop(x2, p, words, decoding, offsets[at + _u64(2)], v, at + _u64(2))
                x3, p = _pop(x3, p, words, decoding, offsets[at + _u64(3)], v, at + _u64(3))
                x4, p = _pop(x4, p, words, decoding, offsets[at + _u64(4)], v, at + _u64(4))
                x5, p = _pop(x5, p, words, decoding, offsets[at + _u64(5)], v, at + _u64(5))
                x6, p = _pop(x6, p, words, decoding, offsets[at + _u64(6)], v, at + _u64(6))
                x7, p = _pop(x7, p, words, decoding, offsets[at + _u64(7)], v, at + _u64(7))
            if (
                header_rows
                and r == 0
                and not fill_tables(v, bases[s], tables[s, 0], tables[s, header_rows])
            ):
                return CORRUPT
    intact = np.int64(p) == count and x0 == x1 == x2 == x3 == x4 == x5 == x6 == x7 == _LOW
    return 0 if intact else CORRUPT
