# ruff: noqa: PLR0917 - kernels take their arguments by position
"""Kernels over the values of a slice, entropy coding excepted.

Plain loops, one pass each, over ``[tokens, columns]`` of one slice, which fits a core's cache.
"""

from __future__ import annotations

import numpy as np

from lmcache_kit_cachegen.jit import jit
from lmcache_kit_cachegen.rans import U16
from lmcache_kit_cachegen.tables import ESCAPE, F32, LARGEST, U8, U32, ZERO_TABLE

_u32 = np.uint32
_f32 = np.float32
LARGEST_STEP = 16000
"""Largest absolute quantised value, so that all of them fit 16 bits."""


@jit
def widen(words: U16, bits: U32) -> None:
    """Convert bfloat16 to float32, as bits."""
    rows, columns = words.shape
    for t in range(rows):
        for c in range(columns):
            bits[t, c] = _u32(words[t, c]) << _u32(16)


@jit
def narrow(bits: U32, words: U16) -> None:
    """Convert float32 to bfloat16, as bits; ties go to even. Not for NaN."""
    rows, columns = bits.shape
    for t in range(rows):
        for c in range(columns):
            u = bits[t, c]
            odd = (u >> _u32(16)) & _u32(1)
            words[t, c] = np.uint16((u + _u32(0x7FFF) + odd) >> _u32(16))


@jit
def round_to_bfloat16(bits: U32) -> None:
    """Round float32 to bfloat16 and back, as bits, in place."""
    rows, columns = bits.shape
    for t in range(rows):
        for c in range(columns):
            u = bits[t, c]
            odd = (u >> _u32(16)) & _u32(1)
            bits[t, c] = (u + _u32(0x7FFF) + odd) & _u32(0xFFFF0000)


@jit
def rotate(
    values: F32, cosines: F32, sines: F32, head_dim: int, interleaved: bool, sign: float
) -> None:
    """Rotate the pairs of each head by ``sign`` times their angle, in place.

    ``cosines`` and ``sines`` are ``[tokens, pairs]``. ``interleaved``: pairs are neighbours
    ("gptj"), else half a head apart ("neox").
    """
    rows, columns = values.shape
    pairs = cosines.shape[1]
    for t in range(rows):
        cosine, sine = cosines[t], sines[t]
        for first in range(0, columns, head_dim):
            head = values[t, first : first + head_dim]
            if interleaved:
                for i in range(pairs):
                    a, b = head[2 * i], head[2 * i + 1]
                    rotated = sine[i] * _f32(sign)
                    head[2 * i] = a * cosine[i] - b * rotated
                    head[2 * i + 1] = b * cosine[i] + a * rotated
            else:
                low, high = head[:pairs], head[pairs : 2 * pairs]
                for i in range(pairs):
                    a, b = low[i], high[i]
                    rotated = sine[i] * _f32(sign)
                    low[i] = a * cosine[i] - b * rotated
                    high[i] = b * cosine[i] + a * rotated


@jit
def moments(values: F32, mean: F32, variance: F32) -> None:
    """Compute mean and variance of each column; neither is finite where a value is not."""
    rows, columns = values.shape
    mean[:] = 0
    variance[:] = 0
    for t in range(rows):
        for c in range(columns):
            d = values[t, c] - values[0, c]
            mean[c] += d
            variance[c] += d * d
    for c in range(columns):
        m = mean[c] / _f32(rows)
        variance[c] = max(variance[c] / _f32(rows) - m * m, _f32(0)) + _f32(0) * m
        mean[c] = values[0, c] + m


@jit
def best_table(size: float, thresholds: F32) -> int:
    """Return the table for symbols with this mean absolute value; never ZERO_TABLE."""
    table = 0
    while table < thresholds.shape[0] and size > thresholds[table]:
        table += 1
    return table + 1


@jit
def round_means(mean: F32, scale: F32, bits: int, thresholds: F32, steps: np.ndarray) -> int:
    """Round means to ``1 / 2 ** bits`` of a step, in place, and write the rounded ``steps``.

    Returns the table for the coarse parts of the means, or -1 if a mean is beyond LARGEST_STEP or
    not a number.
    """
    half = np.int32((1 << bits) >> 1)
    fine = _f32(1 << bits)
    total = _f32(0)
    for c in range(mean.shape[0]):
        z = np.rint(mean[c] / scale[c] * fine)
        if not abs(z) <= LARGEST_STEP:
            return -1
        steps[c] = np.int16(z)
        mean[c] = z / fine * scale[c]
        total += _f32(abs((np.int32(z) + half) >> bits))
    return best_table(float(total / _f32(mean.shape[0])), thresholds)


@jit
def quantise(values: F32, mean: F32, scale: F32, shift: int, steps: np.ndarray, sizes: F32) -> int:
    """Quantise values to steps from the mean of their column.

    ``sizes`` receives the mean absolute coarse part of each column. ``values``, all finite, become
    the values that :func:`join` will compute from the steps. Returns the number of nonzero steps,
    or -1 if a step is beyond LARGEST_STEP.
    """
    rows, columns = values.shape
    largest = _f32(LARGEST_STEP)
    half, part = _f32((1 << shift) >> 1), _f32(1 / (1 << shift))
    inverse = np.empty(columns, np.float32)
    peaks = np.zeros(columns, np.float32)
    nonzero = np.zeros(columns, np.float32)
    sizes[:] = 0
    for c in range(columns):
        inverse[c] = _f32(1) / scale[c]
    # Stay in float32, which holds these integers exactly, so that the loop vectorises in one width.
    for t in range(rows):
        for c in range(columns):
            z = np.rint((values[t, c] - mean[c]) * inverse[c])
            size = abs(z)
            peaks[c] = size if size > peaks[c] else peaks[c]
            z = min(max(z, -largest), largest)
            values[t, c] = z * scale[c] + mean[c]
            nonzero[c] += _f32(1) if z != 0 else _f32(0)
            steps[t, c] = np.int16(z)
            sizes[c] += abs(np.floor((z + half) * part))
    for c in range(columns):
        sizes[c] /= _f32(rows)
        if peaks[c] > largest:
            return -1
    return int(nonzero.sum())


@jit
def choose_tables(sizes: F32, thresholds: F32, tables: U8) -> None:
    """Choose the table of each column; ZERO_TABLE where all symbols are 0."""
    for c in range(sizes.shape[0]):
        tables[c] = best_table(float(sizes[c]), thresholds) if sizes[c] > 0 else ZERO_TABLE


@jit
def header_row(tables: U8, thresholds: F32, limit: np.ndarray, symbols: U8) -> tuple[int, int]:
    """Write the header row with the columns' tables, as symbols around a base.

    Returns the base, and the table that codes the row itself. The row has no escapes: a column's
    table that is too far from the base is replaced by the nearest one within reach.
    """
    columns = tables.shape[0]
    base = 0
    for c in range(columns):
        base += int(tables[c])
    base //= columns
    total, most = 0, 0
    for c in range(columns):
        offset = min(max(int(tables[c]) - base, -LARGEST), LARGEST)
        offset += base + offset == ZERO_TABLE and tables[c] != ZERO_TABLE
        tables[c] = np.uint8(base + offset)
        symbols[c] = np.uint8(offset + LARGEST)
        total += abs(offset)
        most = max(most, abs(offset))
    table = best_table(total / columns, thresholds)
    while limit[table] < most:
        table += 1
    return base, table


@jit
def _escape(row, limits, symbols, escapes, at):  # type: ignore[no-untyped-def]
    """Write values without a symbol as varints: seven bits a byte, the sign in the lowest bit."""
    for c in range(row.shape[0]):
        coarse = int(row[c])
        if abs(coarse) > limits[c]:
            symbols[c] = ESCAPE
            rest = 2 * coarse if coarse >= 0 else -2 * coarse - 1
            while rest > 127:
                escapes[at] = np.uint8(rest & 127 | 128)
                rest >>= 7
                at += 1
            escapes[at] = np.uint8(rest)
            at += 1
    return at


@jit
def split(
    steps: np.ndarray, shift: int, limits: np.ndarray, symbols: U8, low: U8, escapes: U8, at: int
) -> int:
    """Split steps: coarse parts to symbols, fine parts to ``low``, others to ``escapes``.

    Returns the end of the escapes, or -1 if they do not fit. An ``at`` of -1 returns -1.
    """
    if at < 0:
        return -1
    rows, columns = steps.shape
    half = np.int32((1 << shift) >> 1)
    mask = np.int32((1 << shift) - 1)
    row = np.empty(columns, np.int16)
    above = np.empty(columns, np.int16)
    below = np.empty(columns, np.int16)
    for c in range(columns):
        above[c] = np.int16(limits[c])
        below[c] = np.int16(-limits[c])
    for t in range(rows):
        if shift:
            for c in range(columns):
                row[c] = np.int16((np.int32(steps[t, c]) + half) >> shift)
                low[t, c] = np.uint8((np.int32(steps[t, c]) + half) & mask)
        else:
            for c in range(columns):
                row[c] = steps[t, c]
        beyond = 0
        for c in range(columns):
            symbols[t, c] = np.uint8(row[c] + LARGEST)
            beyond += (row[c] > above[c]) | (row[c] < below[c])
        if beyond:
            if at + 3 * columns > escapes.shape[0]:
                return -1
            at = _escape(row, limits, symbols[t], escapes, at)
    return at


@jit
def join(
    symbols: U8, low: U8, shift: int, scale: F32, mean: F32, escapes: U8, at: int, values: F32
) -> int:
    """Join symbols, fine parts and escapes into ``values = steps * scale + mean``.

    The inverse of :func:`split` and :func:`quantise`. Returns the end of the escapes, or -1 if they
    end too early. An ``at`` of -1 returns -1.
    """
    if at < 0:
        return -1
    rows, columns = values.shape
    half = np.int32((1 << shift) >> 1)
    times = _f32(1 << shift)
    for t in range(rows):
        escaped = False
        fine = t if shift else 0
        for c in range(columns):
            q = (_f32(symbols[t, c]) - _f32(LARGEST)) * times
            if shift:
                q += _f32(low[fine, c]) - _f32(half)
            values[t, c] = q * scale[c] + mean[c]
            escaped |= symbols[t, c] == ESCAPE
        if escaped:
            for c in range(columns):
                if symbols[t, c] != ESCAPE:
                    continue
                rest = 0
                for turn in range(3):
                    if at >= escapes.shape[0]:
                        return -1
                    byte = int(escapes[at])
                    at += 1
                    rest |= (byte & 127) << (7 * turn)
                    if byte < 128:
                        break
                signed = -((rest + 1) >> 1) if rest & 1 else rest >> 1
                whole = (signed << shift) + int(low[fine, c]) - int(half)
                values[t, c] = _f32(whole) * scale[c] + mean[c]
    return at


@jit
def violations(original: F32, decoded: F32, bound: F32, relative: float) -> int:
    """Count the values whose error exceeds ``bound[column] + relative * abs(value)``."""
    rows, columns = original.shape
    count = 0
    share = _f32(relative)
    for t in range(rows):
        for c in range(columns):
            x = original[t, c]
            held = abs(x - decoded[t, c]) <= bound[c] + share * abs(x)
            count += not held
    return count


@jit
def pack(values: U8, width: int, packed: U8) -> None:
    """Pack ``width`` bits of each value, the first value in the lowest bits."""
    held, bits, at = np.uint64(0), 0, 0
    for i in range(values.shape[0]):
        held |= np.uint64(values[i]) << np.uint64(bits)
        bits += width
        if bits >= 8:
            packed[at] = np.uint8(held & np.uint64(255))
            held >>= np.uint64(8)
            bits -= 8
            at += 1
    if bits:
        packed[at] = np.uint8(held)


@jit
def unpack(packed: U8, width: int, values: U8) -> None:
    """Unpack ``width`` bits per value; ``packed`` must hold as many bits as ``values`` need."""
    held, bits, at = np.uint64(0), 0, 0
    mask = np.uint64((1 << width) - 1)
    for i in range(values.shape[0]):
        if bits < width:
            held |= np.uint64(packed[at]) << np.uint64(bits)
            bits += 8
            at += 1
        values[i] = np.uint8(held & mask)
        held >>= np.uint64(width)
        bits -= width
