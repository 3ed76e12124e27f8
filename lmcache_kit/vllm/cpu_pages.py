"""vLLM's CPU pages: in the order that its attention kernel wants, which is learnt once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from xxhash import xxh3_64

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.layout import KVLayout
from lmcache_kit.vllm import kernels
from lmcache_kit.vllm.page_layout import Side, Writer, learn_page
from lmcache_kit.vllm.pages import Pages, Piece

_UNSIGNED = {2: np.uint16, 4: np.uint32}
_WORD_BYTES = 8
_PER_WORD = 4  # 16-bit elements


class _Layer(NamedTuple):
    flat: np.ndarray[Any, Any]
    words: np.ndarray[Any, np.dtype[np.uint64]] | None
    block_stride: int
    head_stride: int


class _Move(NamedTuple):
    """One side of one layer, and the payload's rows for it; to the payload if ``gather``."""

    layer: _Layer
    side: Side
    flat: np.ndarray[Any, Any]
    blocks: np.ndarray[Any, np.dtype[np.int64]]
    gather: bool


class _Span(NamedTuple):
    """Tokens of the blocks, and the payload's row of the first one."""

    start: int
    end: int
    skip: int


class CPUPages(Pages):
    """``caches``: one ``[blocks, heads, block, 2 * dim]`` tensor per layer, in layer order;
    ``write`` is vLLM's KV cache writer of one of those layers, whose order serves for all."""

    def __init__(self, caches: Sequence[torch.Tensor], write: Writer, block_tokens: int) -> None:
        first = caches[0]
        self.blocks, heads, self._block, width = first.shape
        self._dim = width // 2
        for cache in caches:
            if cache.shape != first.shape or cache.dtype != first.dtype:
                raise UnsupportedModel("the layers' KV caches differ in shape or dtype")
            if cache.stride(3) != 1 or cache.stride(2) != width:
                raise UnsupportedModel("the pages of the KV cache are not contiguous")
        if block_tokens % self._block:
            raise UnsupportedModel(
                f"a block of {block_tokens} tokens is no multiple of the page's {self._block}"
            )
        self.block_tokens = block_tokens
        dtype = str(first.dtype).removeprefix("torch.")
        self.layout = KVLayout(dtype, len(caches), heads, self._dim)
        self._element = _UNSIGNED[first.element_size()]
        self._sides = learn_page(
            write, heads=heads, block=self._block, dim=self._dim, dtype=first.dtype
        )
        self._transposed = [self._is_transposed(side) for side in self._sides]
        self._layers = [self._flat(cache) for cache in caches]
        self._line = np.empty(max(self._block, self._dim), np.uint64)
        self._square = np.empty(self._block * self._dim // 4, np.uint64)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile each kernel now instead of in the first request: the first block, back and forth.
        A whole page and a part of one take different ways."""
        for tokens in (self._block, self._block - 1):
            payload = memoryview(bytearray(self.layout.payload_bytes(tokens)))
            piece = Piece([0], 0, tokens, payload, tokens)
            self.gather([piece])
            self.scatter(piece)

    def _flat(self, cache: torch.Tensor) -> _Layer:
        extent = 1 + sum(
            (size - 1) * stride for size, stride in zip(cache.shape, cache.stride(), strict=True)
        )
        raw = torch.int16 if cache.element_size() == 2 else torch.int32
        line = torch.as_strided(cache.view(raw), (extent,), (1,), cache.storage_offset())
        flat = line.numpy().view(self._element)
        strides = cache.stride(0), cache.stride(1)
        per_word = _WORD_BYTES // flat.itemsize
        whole = not (extent % per_word or strides[0] % per_word or strides[1] % per_word)
        words = flat.view(np.uint64) if whole and flat.ctypes.data % _WORD_BYTES == 0 else None
        return _Layer(flat, words, *strides)

    def gather(self, pieces: Sequence[Piece]) -> list[int]:
        return [self._move(piece, gather=True) for piece in pieces]

    def scatter(self, piece: Piece) -> int:
        return self._move(piece, gather=False)

    def _move(self, piece: Piece, *, gather: bool) -> int:
        layout = self.layout
        payload = np.frombuffer(piece.payload, self._element)
        payload = payload.reshape(layout.layers, 2, piece.tokens * layout.kv_heads * self._dim)
        blocks = self._pages_of(piece)
        span = _Span(piece.start, piece.end, piece.skip)
        digest = xxh3_64()
        # One layer after the other, so that the hash finds its bytes in the processor's cache.
        for layer, both in zip(self._layers, payload, strict=True):
            for side, flat in zip(self._sides, both, strict=True):
                self._move_side(_Move(layer, side, flat, blocks, gather), span)
            digest.update(both.data)
        return digest.intdigest()

    def _pages_of(self, piece: Piece) -> np.ndarray[Any, np.dtype[np.int64]]:
        blocks = np.asarray(piece.blocks, np.int64)
        ratio = self.block_tokens // self._block
        if ratio > 1:
            blocks = (blocks[:, None] * ratio + np.arange(ratio)).reshape(-1)
        needed = -(-piece.end // self._block)
        if needed > blocks.size or (blocks < 0).any() or (blocks >= self.blocks).any():
            raise IndexError(f"tokens up to {piece.end} are not within the blocks of the KV cache")
        return blocks

    def _move_side(self, move: _Move, span: _Span) -> None:
        block = self._block
        first, last = -(-span.start // block), span.end // block
        if first >= last or not self._in_words(move):
            self._move_tokens(move, span)
            return
        start, end, skip = span
        lead, whole_end = first * block, last * block
        self._move_tokens(move, _Span(start, lead, skip))
        self._move_whole(move, first, last, skip + lead - start)
        self._move_tokens(move, _Span(whole_end, end, skip + whole_end - start))

    def _move_tokens(self, move: _Move, span: _Span) -> None:
        if span.start >= span.end:
            return
        if _consecutive(move.side.columns):
            kernel = kernels.gather_rows if move.gather else kernels.scatter_rows
        else:
            kernel = kernels.gather if move.gather else kernels.scatter
        layer, side = move.layer, move.side
        kernel(
            layer.flat, layer.block_stride, layer.head_stride, move.blocks, side.rows, side.columns,
            span.start, span.end, move.flat, span.skip, self.layout.kv_heads,
        )  # fmt: skip

    def _move_whole(self, move: _Move, first: int, last: int, skip: int) -> None:
        kernel = kernels.gather_transposed if move.gather else kernels.scatter_transposed
        layer = move.layer
        kernel(
            layer.words, layer.block_stride // _PER_WORD, layer.head_stride // _PER_WORD,
            move.blocks[first:last], int(move.side.rows[0]) // _PER_WORD, self._block, self._dim,
            move.flat.view(np.uint64), skip, self.layout.kv_heads, self._line, self._square,
        )  # fmt: skip

    def _in_words(self, move: _Move) -> bool:
        """Whether whole pages of this side can be transposed in 64-bit words."""
        if move.layer.words is None or move.flat.ctypes.data % _WORD_BYTES:
            return False
        return self._transposed[move.side is self._sides[1]]

    def _is_transposed(self, side: Side) -> bool:
        """Whether a page holds 16-bit ``[dim, block]``, in sizes that 64-bit words can carry."""
        return (
            self._element is np.uint16
            and not (self._block % 4 or self._dim % 4 or int(side.rows[0]) % 4)
            and _consecutive(side.rows)
            and bool((side.columns == np.arange(self._dim) * self._block).all())
        )


def _consecutive(offsets: np.ndarray[Any, np.dtype[np.uint64]]) -> bool:
    return bool((np.diff(offsets.astype(np.int64)) == 1).all())
