# ruff: noqa: PLR0917  a kernel takes each array and stride that it touches
"""Kernels that copy between a CPU page and a raw payload, compiled by numba (which vLLM requires).

A *page* holds the K and V of ``block`` tokens for one head, in the order of vLLM's attention
kernel: element ``(n, d)`` of K, or of V, lies at ``rows[n] + columns[d]``. The payload of K, or of
V, of one layer is ``[tokens, heads, dim]``, contiguous.

``pages`` is the flat memory of a layer. ``blocks`` lists the pages of a sequence. ``start`` and
``end`` are token positions counted from the first of ``blocks``. ``skip`` is the row of the payload
that belongs to ``start``. Callers check all bounds: the kernels check nothing.

Indexes are unsigned, since numba adds a test for negative ones to each signed access.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit  # type: ignore[import-untyped]

_F = TypeVar("_F", bound=Callable[..., None])


def _compiled(function: _F) -> _F:
    """Compile at the first call, and keep the code on disk for the next process if possible."""
    kernel: _F
    try:
        kernel = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no directory where numba may keep its cache
        kernel = njit(nogil=True)(function)
    return kernel


U = np.uint64
_16, _32, _48 = U(16), U(32), U(48)
_A, _B, _C, _D = U(0xFFFF), U(0xFFFF << 16), U(0xFFFF << 32), U(0xFFFF << 48)
_1, _2, _3, _4 = U(1), U(2), U(3), U(4)


@_compiled
def gather(
    pages: Any, block_stride: Any, head_stride: Any, blocks: Any, rows: Any, columns: Any,
    start: Any, end: Any, out: Any, skip: Any, heads: Any,
) -> None:  # fmt: skip
    """Copy pages of any order into the payload, element by element."""
    block, dim, heads = U(rows.size), U(columns.size), U(heads)
    for position in range(U(start), U(end)):
        base = U(blocks[position // block]) * U(block_stride) + rows[position % block]
        to = (position - U(start) + U(skip)) * heads * dim
        for _ in range(heads):
            for d in range(dim):
                out[to + d] = pages[base + columns[d]]
            base += U(head_stride)
            to += dim


@_compiled
def scatter(
    pages: Any, block_stride: Any, head_stride: Any, blocks: Any, rows: Any, columns: Any,
    start: Any, end: Any, payload: Any, skip: Any, heads: Any,
) -> None:  # fmt: skip
    """Copy the payload into pages of any order, element by element."""
    block, dim, heads = U(rows.size), U(columns.size), U(heads)
    for position in range(U(start), U(end)):
        base = U(blocks[position // block]) * U(block_stride) + rows[position % block]
        at = (position - U(start) + U(skip)) * heads * dim
        for _ in range(heads):
            for d in range(dim):
                pages[base + columns[d]] = payload[at + d]
            base += U(head_stride)
            at += dim


@_compiled
def gather_rows(
    pages: Any, block_stride: Any, head_stride: Any, blocks: Any, rows: Any, columns: Any,
    start: Any, end: Any, out: Any, skip: Any, heads: Any,
) -> None:  # fmt: skip
    """Copy pages whose ``columns`` are consecutive: one run of memory per token and head."""
    block, dim, heads = U(rows.size), U(columns.size), U(heads)
    position = U(start)
    while position < U(end):
        n = position % block
        count = min(block - n, U(end) - position)
        for head in range(heads):
            page = U(blocks[position // block]) * U(block_stride) + head * U(head_stride)
            to = ((position - U(start) + U(skip)) * heads + head) * dim
            for i in range(n, n + count):
                base = page + rows[i] + columns[U(0)]
                for d in range(dim):
                    out[to + d] = pages[base + d]
                to += heads * dim
        position += count


@_compiled
def scatter_rows(
    pages: Any, block_stride: Any, head_stride: Any, blocks: Any, rows: Any, columns: Any,
    start: Any, end: Any, payload: Any, skip: Any, heads: Any,
) -> None:  # fmt: skip
    """Copy the payload into pages whose ``columns`` are consecutive."""
    block, dim, heads = U(rows.size), U(columns.size), U(heads)
    position = U(start)
    while position < U(end):
        n = position % block
        count = min(block - n, U(end) - position)
        for head in range(heads):
            page = U(blocks[position // block]) * U(block_stride) + head * U(head_stride)
            at = ((position - U(start) + U(skip)) * heads + head) * dim
            for i in range(n, n + count):
                base = page + rows[i] + columns[U(0)]
                for d in range(dim):
                    pages[base + d] = payload[at + d]
                at += heads * dim
        position += count


@_compiled
def transpose_quads(
    source: Any, at: Any, stride: Any, height: Any, width: Any, line: Any, square: Any
) -> None:
    """Transpose 16-bit elements, four at a time in 64-bit words.

    ``source`` holds ``height`` rows of ``width`` words from word ``at`` on, ``stride`` words apart;
    ``square`` receives ``4 * width`` rows of ``height // 4`` words. ``line`` is scratch of ``4 *
    width`` words. The first inner loop vectorises, the second moves whole words within the cache.
    """
    quads = height // _4
    for quad in range(quads):
        a = at + quad * _4 * stride
        b, c, d = a + stride, a + _2 * stride, a + _3 * stride
        for i in range(width):
            w, x, y, z = source[a + i], source[b + i], source[c + i], source[d + i]
            line[i] = (w & _A) | ((x & _A) << _16) | ((y & _A) << _32) | (z << _48)
            line[width + i] = ((w >> _16) & _A) | (x & _B) | ((y & _B) << _16) | ((z & _B) << _32)
            line[_2 * width + i] = (
                ((w >> _32) & _A) | ((x >> _16) & _B) | (y & _C) | ((z & _C) << _16)
            )
            line[_3 * width + i] = (w >> _48) | ((x >> _32) & _B) | ((y >> _16) & _C) | (z & _D)
        for i in range(width):
            to = i * _4 * quads + quad
            square[to] = line[i]
            square[to + quads] = line[width + i]
            square[to + _2 * quads] = line[_2 * width + i]
            square[to + _3 * quads] = line[_3 * width + i]


@_compiled
def gather_transposed(
    pages: Any, block_stride: Any, head_stride: Any, blocks: Any, first: Any,
    block: Any, dim: Any, out: Any, skip: Any, heads: Any, line: Any, square: Any,
) -> None:  # fmt: skip
    """Copy whole pages that hold ``[dim, block]`` into the payload.

    ``first`` is where K, or V, begins in a page. Sizes, strides and ``first`` count 64-bit words;
    ``block``, ``dim`` and ``skip`` count elements.
    """
    heads, words, width = U(heads), U(dim) // _4, U(block) // _4
    for i in range(U(blocks.size)):
        for head in range(heads):
            page = U(blocks[i]) * U(block_stride) + head * U(head_stride) + U(first)
            transpose_quads(pages, page, width, U(dim), width, line, square)
            to = ((i * U(block) + U(skip)) * heads + head) * words
            for n in range(U(block)):
                for d in range(words):
                    out[to + d] = square[n * words + d]
                to += heads * words


@_compiled
def scatter_transposed(
    pages: Any, block_stride: Any, head_stride: Any, blocks: Any, first: Any,
    block: Any, dim: Any, payload: Any, skip: Any, heads: Any, line: Any, square: Any,
) -> None:  # fmt: skip
    """Copy the payload into whole pages that hold ``[dim, block]``."""
    heads, words, width = U(heads), U(dim) // _4, U(block) // _4
    for i in range(U(blocks.size)):
        for head in range(heads):
            at = ((i * U(block) + U(skip)) * heads + head) * words
            transpose_quads(payload, at, heads * words, U(block), words, line, square)
            page = U(blocks[i]) * U(block_stride) + head * U(head_stride) + U(first)
            for j in range(U(dim) * width):
                pages[page + j] = square[j]
