"""Streams of quantised values: one or more slices (one layer's K or V), coded together.

Bytes of a stream: its kind and how long the coded symbols are; a record for each slice; the fine
bits of the means; those of the values; the coded symbols; the escapes. What a profile provides
is left out.
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
from lmcache_kit_cachegen.slices import (
    LARGEST_EXPONENT,
    NotHeld,
    Plan,
    Slice,
    mean_bits,
    quantise,
    step,
)
from lmcache_kit_cachegen.tables import (
    BETWEEN,
    DECODING,
    ENCODING,
    LARGEST,
    LIMIT,
    RECIPROCAL,
    SYMBOLS,
    TABLES,
    U8,
)

HEADS = 2
"""Rows before a slice's values: the tables of its columns, and their means."""
OWN_STATISTICS_TOKENS = 48
"""From here on a chunk's own means and tables pay for themselves, also where a profile has some."""

_KIND = struct.Struct("<BI")
_FROM_PROFILE, _OWN_STATISTICS, _MEAN_BITS_AT = 1, 2, 2
_RECORD = struct.Struct("<hBBB")  # step, base of the tables, tables of the two head rows


def encode(slices: Bits, first: int, plan: Plan) -> Stream | None:
    """``slices``: ``[slices, tokens, columns]``; ``first``: the number of the first of them.

    None where the error's bound cannot be held, or holding it saves nothing: they are to be
    stored losslessly then.
    """
    for profiled in (True, False) if plan.profile is not None else (False,):
        own = not profiled or plan.tokens >= OWN_STATISTICS_TOKENS
        try:
            parts = [
                quantise(words, number, plan, profiled=profiled, own=own)
                for number, words in enumerate(slices, first)
            ]
            stream = _code(parts, plan, profiled=profiled, own=own)
        except NotHeld:
            continue
        if len(stream.data) < slices.nbytes:
            return stream
    return None


def _code(parts: list[Slice], plan: Plan, *, profiled: bool, own: bool) -> Stream:
    """Raises NotHeld if too much of it has no symbol."""
    heads = HEADS if own else 0
    fine = mean_bits(plan.tokens) if own else 0
    shift = plan.parameters.shift
    count, columns = len(parts), plan.columns
    symbols = np.full((count, heads + plan.tokens, plan.padded), LARGEST, np.uint8)
    tables = np.zeros((count, heads + 1, plan.padded), np.uint8)
    mean_low = np.zeros((count, 1, columns), np.uint8)
    low = np.zeros((count, plan.tokens if shift else 1, columns), np.uint8)
    escapes = np.empty(count * (plan.tokens + 4) * columns // 4 + 3 * columns, np.uint8)
    records, at = [], 0
    for i, part in enumerate(parts):
        if own:
            base, row_table = kernels.head_row(part.tables, BETWEEN, LIMIT, symbols[i, 0])
            tables[i, 0, :columns] = row_table
            tables[i, 1, :columns] = part.mean_table
            records.append(_RECORD.pack(part.exponent, base, row_table, part.mean_table))
            limits = np.full(columns, LIMIT[part.mean_table], np.int32)
            at = kernels.split(
                part.mean_steps[None], fine, limits, symbols[i, 1:], mean_low[i], escapes, at
            )
        tables[i, heads, :columns] = part.tables
        at = kernels.split(
            part.steps, shift, LIMIT[part.tables], symbols[i, heads:], low[i], escapes, at
        )
    if at < 0:
        raise NotHeld
    coded = _entropy_code(symbols, tables, heads, plan)
    kind = _FROM_PROFILE * profiled | _OWN_STATISTICS * own | fine << _MEAN_BITS_AT
    pieces = [
        _KIND.pack(kind, len(coded)),
        *records,
        _pack(mean_low, fine),
        _pack(low, shift),
        coded,
        escapes[:at].tobytes(),
    ]
    return Stream(plan.coder, b"".join(pieces))


def _entropy_code(symbols: U8, tables: U8, heads: int, plan: Plan) -> bytes:
    if plan.coder == Coder.ZSTD:
        return zstd_compress(np.ascontiguousarray(symbols[:, :, : plan.columns]).data.cast("B"))
    words = np.empty(symbols.size + rans.FLUSH_WORDS + 1, np.uint16)
    begin = rans.encode(symbols, tables, heads, ENCODING, RECIPROCAL, words)
    return words[begin:].tobytes()


def _pack(low: U8, bits: int) -> bytes:
    if bits == 0:
        return b""
    packed = np.empty(-(-low.size * bits // 8), np.uint8)
    kernels.pack(low.reshape(-1), bits, packed)
    return packed.tobytes()


class _Reader:
    """Takes a stream's bytes from front to back. Raises CorruptBlob at an early end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._data):
            raise CorruptBlob("a quantised stream ends too early")
        taken, self._data = self._data[:nbytes], self._data[nbytes:]
        return taken

    def bits(self, shape: tuple[int, ...], width: int) -> U8:
        """``width`` bits for each element."""
        values = np.zeros(shape, np.uint8)
        if width:
            packed = np.frombuffer(self.take(-(-values.size * width // 8)), np.uint8).copy()
            kernels.unpack(packed, width, values.reshape(-1))
        return values

    def rest(self) -> U8:
        return np.frombuffer(self.take(len(self._data)), np.uint8).copy()


class _Record(NamedTuple):
    """What stands in a stream about one slice. ``tables_table`` and ``means_table`` are the tables
    of its two head rows, ``base`` is what the first of them counts from."""

    exponent: int
    base: int
    tables_table: int
    means_table: int


def decode(stream: Stream, first: int, slices: Bits, plan: Plan) -> None:
    """Fill ``slices``, ``[slices, tokens, columns]``. Raises CorruptBlob."""
    reader = _Reader(stream.data)
    kind, coded_bytes = _KIND.unpack(reader.take(_KIND.size))
    profiled, own = bool(kind & _FROM_PROFILE), bool(kind & _OWN_STATISTICS)
    fine = kind >> _MEAN_BITS_AT
    if fine > 2 or not (own or profiled) or (profiled and plan.profile is None):
        raise CorruptBlob(f"a quantised stream is of kind {kind}, which does not exist")
    count, columns, shift = len(slices), plan.columns, plan.parameters.shift
    records = _records(reader, count if own else 0)
    mean_low = reader.bits((count, 1, columns), fine)
    low = reader.bits((count, plan.tokens if shift else 1, columns), shift)
    coded = reader.take(coded_bytes)
    heads = HEADS if own else 0
    shape = (count, heads + plan.tokens, columns)
    if stream.coder == Coder.ZSTD:
        symbols = _zstd_symbols(coded, shape)
    else:
        known = None if own else plan.known.tables[first : first + count]
        symbols = _rans_symbols(coded, shape, records, known)
    escapes, at = reader.rest(), 0
    one, zero = np.ones(columns, np.float32), np.zeros(columns, np.float32)
    mean = np.empty((1, columns), np.float32)
    values = np.empty((plan.tokens, columns), np.float32)
    for i in range(count):
        number = first + i
        scale = plan.profile_scale(number) if profiled else step(records[i].exponent, columns)
        if own:
            at = kernels.join(symbols[i, 1:], mean_low[i], fine, one, zero, escapes, at, mean)
            mean[0] *= scale / np.float32(1 << fine)
        else:
            mean[0] = plan.known.means[number]
        at = kernels.join(symbols[i, heads:], low[i], shift, scale, mean[0], escapes, at, values)
        if at < 0:
            raise CorruptBlob("the escapes of a quantised stream end too early")
        if plan.is_rotated(number):
            plan.rotate(values, 1.0)
        narrow(values, plan.dtype, slices[i])
    if at != len(escapes):
        raise CorruptBlob("a quantised stream goes on after its end")


def _records(reader: _Reader, count: int) -> list[_Record]:
    data = reader.take(_RECORD.size * count)
    records = [_Record(*fields) for fields in _RECORD.iter_unpack(data)]
    for record in records:
        named = (record.tables_table, record.means_table)
        if abs(record.exponent) > LARGEST_EXPONENT or not all(0 < t < TABLES for t in named):
            raise CorruptBlob("a quantised stream has a step or a table that does not exist")
    return records


def _zstd_symbols(coded: memoryview, shape: tuple[int, int, int]) -> U8:
    plain = zstd_decompress(coded, shape[0] * shape[1] * shape[2])
    symbols = np.frombuffer(bytearray(plain), np.uint8).reshape(shape)
    if symbols.max() >= SYMBOLS:
        raise CorruptBlob("a quantised stream has a symbol that does not exist")
    return symbols


def _rans_symbols(
    coded: memoryview, shape: tuple[int, int, int], records: list[_Record], known: U8 | None
) -> U8:
    """``known``: the tables of all columns, where they do not stand in the stream."""
    count, rows, columns = shape
    padded = -(-columns // rans.STATES) * rans.STATES
    heads = HEADS if records else 0
    tables = np.zeros((count, heads + 1, padded), np.uint8)
    bases = np.zeros(count, np.int64)
    for i, record in enumerate(records):
        bases[i] = record.base
        tables[i, 0, :columns] = record.tables_table
        tables[i, 1, :columns] = record.means_table
    if known is not None:
        tables[:, 0, :columns] = known
    if len(coded) % 2:
        raise CorruptBlob("the coded symbols are not whole words")
    words = np.zeros(len(coded) // 2 + padded, np.uint16)
    words[: len(coded) // 2] = np.frombuffer(coded, "<u2")
    symbols = np.empty((count, rows, padded), np.uint8)
    if rans.decode(words, len(coded) // 2, tables, bases, heads, DECODING, symbols) != 0:
        raise CorruptBlob("the coded symbols are not what an encoder writes")
    return symbols
