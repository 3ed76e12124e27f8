"""Streams of quantised values: one or more slices (one layer's K or V), coded together.

Layout of a stream: its kind and the length of the coded symbols; a record for each slice; the fine
bits of the means; the fine bits of the values; the coded symbols; the escapes. Parts that a profile
provides are left out.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from lmcache_kit.errors import CorruptBlob
from lmcache_kit_cachegen import kernels, rans
from lmcache_kit_cachegen.bits import Bits, narrow
from lmcache_kit_cachegen.bitstream import Coder, Stream
from lmcache_kit_cachegen.lossless import zstd_compress, zstd_decompress
from lmcache_kit_cachegen.quantiser import (
    LARGEST_EXPONENT,
    BoundExceeded,
    Slice,
    StreamParameters,
    mean_bits,
    quantise,
    step,
)
from lmcache_kit_cachegen.tables import (
    DECODING,
    ENCODING,
    LARGEST,
    MAX_SYMBOL,
    RECIPROCAL,
    SYMBOLS,
    TABLES,
    THRESHOLDS,
    U8,
)

HEADER_ROWS = 2
"""Rows before a slice's values: the tables of its columns, and the means of its columns."""
OWN_STATISTICS_TOKENS = 48
"""Chunks of at least so many tokens carry their own means and tables, even where a profile has
some: those then cost less than they save."""

_KIND = struct.Struct("<BI")
_FROM_PROFILE, _OWN_STATISTICS, _MEAN_BITS_AT = 1, 2, 2
_RECORD = struct.Struct("<hBBB")  # step, base of the tables, tables of the two head rows


def encode(slices: Bits, first: int, params: StreamParameters) -> Stream | None:
    """Encode ``slices``, ``[slices, tokens, columns]``; ``first`` is the number of the first one.

    Returns None where the error bound cannot be kept, or where quantising saves nothing. The caller
    then stores the slices losslessly.
    """
    for profiled in (True, False) if params.profile is not None else (False,):
        own_statistics = not profiled or params.tokens >= OWN_STATISTICS_TOKENS
        try:
            parts = [
                quantise(words, number, params, profiled=profiled, own_statistics=own_statistics)
                for number, words in enumerate(slices, first)
            ]
            stream = _code(parts, params, profiled=profiled, own_statistics=own_statistics)
        except BoundExceeded:
            continue
        if len(stream.data) < slices.nbytes:
            return stream
    return None


def _code(
    parts: list[Slice], params: StreamParameters, *, profiled: bool, own_statistics: bool
) -> Stream:
    """Code quantised slices into a stream. Raises BoundExceeded for too many escapes."""
    header_rows = HEADER_ROWS if own_statistics else 0
    fine = mean_bits(params.tokens) if own_statistics else 0
    shift = params.level_settings.shift
    count, columns = len(parts), params.columns
    symbols = np.full((count, header_rows + params.tokens, params.padded), LARGEST, np.uint8)
    tables = np.zeros((count, header_rows + 1, params.padded), np.uint8)
    mean_low = np.zeros((count, 1, columns), np.uint8)
    low = np.zeros((count, params.tokens if shift else 1, columns), np.uint8)
    escapes = np.empty(count * (params.tokens + 4) * columns // 4 + 3 * columns, np.uint8)
    records, at = [], 0
    for i, part in enumerate(parts):
        if own_statistics:
            base, row_table = kernels.header_row(part.tables, THRESHOLDS, MAX_SYMBOL, symbols[i, 0])
            tables[i, 0, :columns] = row_table
            tables[i, 1, :columns] = part.mean_table
            records.append(_RECORD.pack(part.exponent, base, row_table, part.mean_table))
            limits = np.full(columns, MAX_SYMBOL[part.mean_table], np.int32)
            at = kernels.split(
                part.mean_steps[None], fine, limits, symbols[i, 1:], mean_low[i], escapes, at
            )
        tables[i, header_rows, :columns] = part.tables
        at = kernels.split(
            part.steps,
            shift,
            MAX_SYMBOL[part.tables],
            symbols[i, header_rows:],
            low[i],
            escapes,
            at,
        )
    if at < 0:
        raise BoundExceeded
    coded = _entropy_code(symbols, tables, header_rows, params)
    kind = _FROM_PROFILE * profiled | _OWN_STATISTICS * own_statistics | fine << _MEAN_BITS_AT
    fields = [
        _KIND.pack(kind, len(coded)),
        *records,
        _pack(mean_low, fine),
        _pack(low, shift),
        coded,
        escapes[:at].tobytes(),
    ]
    return Stream(params.coder, b"".join(fields))


def _entropy_code(symbols: U8, tables: U8, header_rows: int, params: StreamParameters) -> bytes:
    if params.coder == Coder.ZSTD:
        return zstd_compress(np.ascontiguousarray(symbols[:, :, : params.columns]).data.cast("B"))
    words = np.empty(symbols.size + rans.FLUSH_WORDS + 1, np.uint16)
    begin = rans.encode(symbols, tables, header_rows, ENCODING, RECIPROCAL, words)
    return words[begin:].tobytes()


def _pack(low: U8, bits: int) -> bytes:
    if bits == 0:
        return b""
    packed = np.empty(-(-low.size * bits // 8), np.uint8)
    kernels.pack(low.reshape(-1), bits, packed)
    return packed.tobytes()


class _Reader:
    """Read a stream's bytes from front to back. Raises CorruptBlob at an early end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._data):
            raise CorruptBlob(
                f"a quantised stream ends too early: {nbytes} bytes wanted, {len(self._data)} left"
            )
        taken, self._data = self._data[:nbytes], self._data[nbytes:]
        return taken

    def bits(self, shape: tuple[int, ...], width: int) -> U8:
        """Read ``width`` bits for each element of ``shape``."""
        values = np.zeros(shape, np.uint8)
        if width:
            packed = np.frombuffer(self.take(-(-values.size * width // 8)), np.uint8).copy()
            kernels.unpack(packed, width, values.reshape(-1))
        return values

    def rest(self) -> U8:
        return np.frombuffer(self.take(len(self._data)), np.uint8).copy()


class _Record(NamedTuple):
    """Record of one slice in a stream.

    ``tables_table`` and ``means_table`` are the tables that code its two header rows. ``base`` is
    the table that offset 0 in the first header row stands for.
    """

    exponent: int
    base: int
    tables_table: int
    means_table: int


def decode(stream: Stream, first: int, slices: Bits, params: StreamParameters) -> None:
    """Decode into ``slices``, ``[slices, tokens, columns]``. Raises CorruptBlob."""
    reader = _Reader(stream.data)
    kind, coded_bytes = _KIND.unpack(reader.take(_KIND.size))
    profiled, own_statistics = bool(kind & _FROM_PROFILE), bool(kind & _OWN_STATISTICS)
    fine = kind >> _MEAN_BITS_AT
    if fine > 2 or not (own_statistics or profiled) or (profiled and params.profile is None):
        raise CorruptBlob(f"a quantised stream has the invalid kind {kind}")
    count, columns, shift = len(slices), params.columns, params.level_settings.shift
    records = _records(reader, count if own_statistics else 0)
    mean_low = reader.bits((count, 1, columns), fine)
    low = reader.bits((count, params.tokens if shift else 1, columns), shift)
    coded = reader.take(coded_bytes)
    header_rows = HEADER_ROWS if own_statistics else 0
    shape = (count, header_rows + params.tokens, columns)
    if stream.coder == Coder.ZSTD:
        symbols = _zstd_symbols(coded, shape)
    else:
        known = None if own_statistics else params.required_profile.tables[first : first + count]
        symbols = _rans_symbols(coded, shape, records, known)
    escapes, at = reader.rest(), 0
    one, zero = np.ones(columns, np.float32), np.zeros(columns, np.float32)
    mean = np.empty((1, columns), np.float32)
    values = np.empty((params.tokens, columns), np.float32)
    for i in range(count):
        number = first + i
        scale = params.profile_scale(number) if profiled else step(records[i].exponent, columns)
        if own_statistics:
            at = kernels.join(symbols[i, 1:], mean_low[i], fine, one, zero, escapes, at, mean)
            mean[0] *= scale / np.float32(1 << fine)
        else:
            mean[0] = params.required_profile.means[number]
        at = kernels.join(
            symbols[i, header_rows:], low[i], shift, scale, mean[0], escapes, at, values
        )
        if at < 0:
            raise CorruptBlob(f"the escapes of a quantised stream end too early, in slice {number}")
        if params.has_rope(number):
            params.rotate(values, 1.0)
        narrow(values, params.dtype, slices[i])
    if at != len(escapes):
        raise CorruptBlob(
            f"a quantised stream has {len(escapes)} bytes of escapes; {at} were decoded"
        )


def _records(reader: _Reader, count: int) -> list[_Record]:
    data = reader.take(_RECORD.size * count)
    records = [_Record(*fields) for fields in _RECORD.iter_unpack(data)]
    for record in records:
        named = (record.tables_table, record.means_table)
        if abs(record.exponent) > LARGEST_EXPONENT or not all(0 < t < TABLES for t in named):
            raise CorruptBlob(
                f"a quantised stream has step exponent {record.exponent} and tables {named}; known "
                f"are exponents up to {LARGEST_EXPONENT} and tables 1 to {TABLES - 1}"
            )
    return records


def _zstd_symbols(coded: memoryview, shape: tuple[int, int, int]) -> U8:
    plain = zstd_decompress(coded, shape[0] * shape[1] * shape[2])
    symbols = np.frombuffer(bytearray(plain), np.uint8).reshape(shape)
    if symbols.max() >= SYMBOLS:
        raise CorruptBlob(
            f"a quantised stream has symbol {symbols.max()}; the last one is {SYMBOLS - 1}"
        )
    return symbols


def _rans_symbols(
    coded: memoryview, shape: tuple[int, int, int], records: list[_Record], known: U8 | None
) -> U8:
    """Decode the symbols; ``known`` holds the tables of all columns if the stream does not."""
    count, rows, columns = shape
    padded = -(-columns // rans.STATES) * rans.STATES
    header_rows = HEADER_ROWS if records else 0
    tables = np.zeros((count, header_rows + 1, padded), np.uint8)
    bases = np.zeros(count, np.int64)
    for i, record in enumerate(records):
        bases[i] = record.base
        tables[i, 0, :columns] = record.tables_table
        tables[i, 1, :columns] = record.means_table
    if known is not None:
        tables[:, 0, :columns] = known
    if len(coded) % 2:
        raise CorruptBlob(f"the coded symbols take {len(coded)} bytes, an odd number")
    words = np.zeros(len(coded) // 2 + padded, np.uint16)
    words[: len(coded) // 2] = np.frombuffer(coded, "<u2")
    symbols = np.empty((count, rows, padded), np.uint8)
    if rans.decode(words, len(coded) // 2, tables, bases, header_rows, DECODING, symbols) != 0:
        raise CorruptBlob(f"the {len(coded)} bytes of coded symbols do not decode")
    return symbols
