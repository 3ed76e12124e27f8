# ruff: noqa: PLR0917 - what a kernel needs, it is given by position
"""What is done to every value besides coding it. Plain loops, one pass each, over ``[tokens,
columns]`` of one slice, which fits a core's cache."""

from __future__ import annotations

import numpy as np

from lmcache_kit_cachegen.jit import jit
from lmcache_kit_cachegen.rans import U16
from lmcache_kit_cachegen.tables import CERTAIN, ESCAPE, F32, LARGEST, U8, U32

_u32 = np.uint32
_f32 = np.float32
LARGEST_STEP = 16000
"""Of a quantised value, so that all of them fit 16 bits."""


@jit
def widen(words: U16, bits: U32) -> None:
    """bfloat16 to float32, as bits."""
    rows, columns = words.shape
    for t in range(rows):
        for c in range(columns):
            bits[t, c] = _u32(words[t, c]) << _u32(16)


@jit
def narrow(bits: U32, words: U16) -> None:
    """float32 to bfloat16, as bits; ties go to even. Not for NaN."""
    rows, columns = bits.shape
    for t in range(rows):
        for c in range(columns):
            u = bits[t, c]
            odd = (u >> _u32(16)) & _u32(1)
            words[t, c] = np.uint16((u + _u32(0x7FFF) + odd) >> _u32(16))


@jit
def round_to_bfloat16(bits: U32) -> None:
    """What :func:`narrow` and :func:`widen` make of it, in place."""
    rows, columns = bits.shape
    for t in range(rows):
        for c in range(columns):
            u = bits[t, c]
            odd = (u >> _u32(16)) & _u32(1)
            bits[t, c] = (u + _u32(0x7FFF) + odd) & _u32(0xFFFF0000)


@jit
def rotate(values: F32, cosines: F32, sines: F32, head_dim: int, near: bool, sign: float) -> None:
    """Turn the pairs of each head by ``sign`` times their angle, in place.

    ``cosines``, ``sines``: ``[tokens, pairs]``. ``near``: pairs are neighbours ("gptj"), else
    halves apart ("neox").
    """
    rows, columns = values.shape
    pairs = cosines.shape[1]
    for t in range(rows):
        cosine, sine = cosines[t], sines[t]
        for first in range(0, columns, head_dim):
            head = values[t, first : first + head_dim]
            if near:
                for i in range(pairs):
                    a, b = head[2 * i], head[2 * i + 1]
                    turned = sine[i] * _f32(sign)
                    head[2 * i] = a * cosine[i] - b * turned
                    head[2 * i + 1] = b * cosine[i] + a * turned
            else:
                low, high = head[:pairs], head[pairs : 2 * pairs]
                for i in range(pairs):
                    a, b = low[i], high[i]
                    turned = sine[i] * _f32(sign)
                    low[i] = a * cosine[i] - b * turned
                    high[i] = b * cosine[i] + a * turned


@jit
def moments(values: F32, mean: F32, variance: F32) -> None:
    """Per column. Neither is finite where a value is not."""
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
def best_table(size: float, between: F32) -> int:
    """For symbols with this mean absolute value; never CERTAIN."""
    table = 0
    while table < between.shape[0] and size > between[table]:
        table += 1
    return table + 1


@jit
def round_means(mean: F32, scale: F32, bits: int, between: F32, steps: np.ndarray) -> int:
    """Means to ``1 / 2 ** bits`` of a step, and to such steps. The table for their coarse parts,
    or -1 if one is beyond LARGEST_STEP or not a number."""
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
    return best_table(float(total / _f32(mean.shape[0])), between)


@jit
def quantise(values: F32, mean: F32, scale: F32, shift: int, steps: np.ndarray, sizes: F32) -> int:
    """Steps from the mean, and per column the mean size of their coarse parts.

    ``values``, all finite, become what :func:`join` will make of the steps. Returns how many steps
    are not 0, or -1 if one is beyond LARGEST_STEP.
    """
    rows, columns = values.shape
    largest = _f32(LARGEST_STEP)
    half, part = _f32((1 << shift) >> 1), _f32(1 / (1 << shift))
    inverse = np.empty(columns, np.float32)
    peaks = np.zeros(columns, np.float32)
    filled = np.zeros(columns, np.float32)
    sizes[:] = 0
    for c in range(columns):
        inverse[c] = _f32(1) / scale[c]
    # All in float32, which holds these integers exactly, to stay in one width.
    for t in range(rows):
        for c in range(columns):
            z = np.rint((values[t, c] - mean[c]) * inverse[c])
            size = abs(z)
            peaks[c] = size if size > peaks[c] else peaks[c]
            z = min(max(z, -largest), largest)
            values[t, c] = z * scale[c] + mean[c]
            filled[c] += _f32(1) if z != 0 else _f32(0)
            steps[t, c] = np.int16(z)
            sizes[c] += abs(np.floor((z + half) * part))
    for c in range(columns):
        sizes[c] /= _f32(rows)
        if peaks[c] > largest:
            return -1
    return int(filled.sum())


@jit
def choose_tables(sizes: F32, between: F32, tables: U8) -> None:
    """The table of each column; CERTAIN where all symbols are 0."""
    for c in range(sizes.shape[0]):
        tables[c] = best_table(float(sizes[c]), between) if sizes[c] > 0 else CERTAIN


@jit
def head_row(tables: U8, between: F32, limit: np.ndarray, symbols: U8) -> tuple[int, int]:
    """The row that says which tables the columns have: symbols around a base.

    Returns the base and the table of the row itself, which has no escapes: a table that is too
    far from the base becomes the nearest one that can be said.
    """
    columns = tables.shape[0]
    base = 0
    for c in range(columns):
        base += int(tables[c])
    base //= columns
    total, most = 0, 0
    for c in range(columns):
        offset = min(max(int(tables[c]) - base, -LARGEST), LARGEST)
        offset += base + offset == CERTAIN and tables[c] != CERTAIN
        tables[c] = np.uint8(base + offset)
        symbols[c] = np.uint8(offset + LARGEST)
        total += abs(offset)
        most = max(most, abs(offset))
    table = best_table(total / columns, between)
    while limit[table] < most:
        table += 1
    return base, table


@jit
def _escape(row, limits, symbols, escapes, at):  # type: ignore[no-untyped-def]
    """Values without a symbol, as seven bits a byte, the sign lowest."""
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
    """Coarse parts to symbols, fine parts to ``low``, and what has no symbol to ``escapes``.

    Returns where the escapes end, or -1 if there are more than fit; -1 as ``at`` stays so.
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
    """The reverse of :func:`split` and :func:`quantise`: ``values = steps * scale + mean``.

    Returns where the escapes end, or -1 if they end too early; -1 as ``at`` stays so.
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
def violations(wanted: F32, got: F32, bound: F32, relative: float) -> int:
    """How many values are further off than their column's bound and their share of rounding."""
    rows, columns = wanted.shape
    count = 0
    share = _f32(relative)
    for t in range(rows):
        for c in range(columns):
            x = wanted[t, c]
            held = abs(x - got[t, c]) <= bound[c] + share * abs(x)
            count += not held
    return count


@jit
def pack(values: U8, width: int, packed: U8) -> None:
    """``width`` bits of each value, the first one lowest."""
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
    """The reverse of :func:`pack`; ``packed`` has all bits that ``values`` need."""
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
