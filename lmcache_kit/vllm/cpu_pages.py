"""vLLM's KV pages on CPU, in the element order of its attention kernel, which is detected once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from xxhash import xxh3_64

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.layout import KVLayout
from lmcache_kit.vllm import kernels
from lmcache_kit.vllm.kv_pages import KVPages, TransferSpec
from lmcache_kit.vllm.page_layout import PageLayout, Writer, detect_page_layouts

_UNSIGNED = {2: np.uint16, 4: np.uint32}
_WORD_BYTES = 8
_PER_WORD = 4  # 16-bit elements


class _Layer(NamedTuple):
    flat: np.ndarray[Any, Any]
    words: np.ndarray[Any, np.dtype[np.uint64]] | None
    block_stride: int
    head_stride: int


class _Copy(NamedTuple):
    """Copy of K or V of one layer between pages and ``flat``, the payload's part of both.

    ``gather`` copies into the payload, else out of it.
    """

    layer: _Layer
    page_layout: PageLayout
    flat: np.ndarray[Any, Any]
    blocks: np.ndarray[Any, np.dtype[np.int64]]
    gather: bool


class _TokenRange(NamedTuple):
    """Tokens ``[start, end)`` of the blocks; row ``skip`` of the payload belongs to ``start``."""

    start: int
    end: int
    skip: int


class CPUPages(KVPages):
    """KV pages of vLLM's CPU attention.

    ``caches`` holds one ``[blocks, heads, block, 2 * dim]`` tensor per layer, in layer order.
    ``write`` is vLLM's KV cache writer of one of those layers; its page layout serves for all.
    """

    def __init__(self, caches: Sequence[torch.Tensor], write: Writer, block_tokens: int) -> None:
        first = caches[0]
        self.blocks, heads, self._block, width = first.shape
        self._dim = width // 2
        for cache in caches:
            if cache.shape != first.shape or cache.dtype != first.dtype:
                raise UnsupportedModel(
                    f"its layers' KV caches differ: {tuple(first.shape)} of {first.dtype} and "
                    f"{tuple(cache.shape)} of {cache.dtype}; one shape and dtype is supported"
                )
            if cache.stride(3) != 1 or cache.stride(2) != width:
                raise UnsupportedModel(
                    f"the pages of its KV cache have strides {cache.stride()}; "
                    f"contiguous pages are supported"
                )
        if block_tokens % self._block:
            raise UnsupportedModel(
                f"its blocks of {block_tokens} tokens are no multiple of a page of {self._block}"
            )
        self.block_tokens = block_tokens
        dtype = str(first.dtype).removeprefix("torch.")
        self.layout = KVLayout(dtype, len(caches), heads, self._dim)
        self._element = _UNSIGNED[first.element_size()]
        self._page_layouts = detect_page_layouts(
            write, heads=heads, block=self._block, dim=self._dim, dtype=first.dtype
        )
        self._transposed = [self._is_transposed(page_layout) for page_layout in self._page_layouts]
        self._layers = [self._flat(cache) for cache in caches]
        self._line = np.empty(max(self._block, self._dim), np.uint64)
        self._square = np.empty(self._block * self._dim // 4, np.uint64)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile each kernel now instead of in the first request.

        Copies the first block out and back, as a whole page and as a part of one: these use
        different kernels.
        """
        for tokens in (self._block, self._block - 1):
            payload = memoryview(bytearray(self.layout.payload_bytes(tokens)))
            transfer = TransferSpec([0], 0, tokens, payload, tokens)
            self.gather([transfer])
            self.scatter(transfer)

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

    def gather(self, transfers: Sequence[TransferSpec]) -> list[int]:
        return [self._transfer(transfer, gather=True) for transfer in transfers]

    def scatter(self, transfer: TransferSpec) -> int:
        return self._transfer(transfer, gather=False)

    def _transfer(self, transfer: TransferSpec, *, gather: bool) -> int:
        layout = self.layout
        payload = np.frombuffer(transfer.payload, self._element)
        payload = payload.reshape(layout.layers, 2, transfer.tokens * layout.kv_heads * self._dim)
        blocks = self._pages_of(transfer)
        tokens = _TokenRange(transfer.start, transfer.end, transfer.skip)
        digest = xxh3_64()
        # Hash each layer right after its copy, while its bytes are in the processor's cache.
        for layer, kv in zip(self._layers, payload, strict=True):
            for page_layout, flat in zip(self._page_layouts, kv, strict=True):
                self._copy_kv(_Copy(layer, page_layout, flat, blocks, gather), tokens)
            digest.update(kv.data)
        return digest.intdigest()

    def _pages_of(self, transfer: TransferSpec) -> np.ndarray[Any, np.dtype[np.int64]]:
        blocks = np.asarray(transfer.blocks, np.int64)
        ratio = self.block_tokens // self._block
        if ratio > 1:
            blocks = (blocks[:, None] * ratio + np.arange(ratio)).reshape(-1)
        needed = -(-transfer.end // self._block)
        if needed > blocks.size or (blocks < 0).any() or (blocks >= self.blocks).any():
            raise IndexError(
                f"tokens up to {transfer.end} are not within the blocks of the KV cache"
            )
        return blocks

    def _copy_kv(self, copy: _Copy, tokens: _TokenRange) -> None:
        block = self._block
        first, last = -(-tokens.start // block), tokens.end // block
        if first >= last or not self._in_words(copy):
            self._copy_tokens(copy, tokens)
            return
        start, end, skip = tokens
        lead, whole_end = first * block, last * block
        self._copy_tokens(copy, _TokenRange(start, lead, skip))
        self._copy_whole_pages(copy, first, last, skip + lead - start)
        self._copy_tokens(copy, _TokenRange(whole_end, end, skip + whole_end - start))

    def _copy_tokens(self, copy: _Copy, tokens: _TokenRange) -> None:
        if tokens.start >= tokens.end:
            return
        if _consecutive(copy.page_layout.columns):
            kernel = kernels.gather_rows if copy.gather else kernels.scatter_rows
        else:
            kernel = kernels.gather if copy.gather else kernels.scatter
        layer, page_layout = copy.layer, copy.page_layout
        kernel(
            layer.flat, layer.block_stride, layer.head_stride, copy.blocks,
            page_layout.rows, page_layout.columns, tokens.start, tokens.end,
            copy.flat, tokens.skip, self.layout.kv_heads,
        )  # fmt: skip

    def _copy_whole_pages(self, copy: _Copy, first: int, last: int, skip: int) -> None:
        kernel = kernels.gather_transposed if copy.gather else kernels.scatter_transposed
        layer = copy.layer
        kernel(
            layer.words, layer.block_stride // _PER_WORD, layer.head_stride // _PER_WORD,
            copy.blocks[first:last], int(copy.page_layout.rows[0]) // _PER_WORD,
            self._block, self._dim, copy.flat.view(np.uint64), skip, self.layout.kv_heads,
            self._line, self._square,
        )  # fmt: skip

    def _in_words(self, copy: _Copy) -> bool:
        """Whether whole pages of this copy can be transposed in 64-bit words."""
        if copy.layer.words is None or copy.flat.ctypes.data % _WORD_BYTES:
            return False
        return self._transposed[copy.page_layout is self._page_layouts[1]]

    def _is_transposed(self, page_layout: PageLayout) -> bool:
        """Whether a page holds 16-bit ``[dim, block]``, in sizes that fill 64-bit words."""
        return (
            self._element is np.uint16
            and not (self._block % 4 or self._dim % 4 or int(page_layout.rows[0]) % 4)
            and _consecutive(page_layout.rows)
            and bool((page_layout.columns == np.arange(self._dim) * self._block).all())
        )


def _consecutive(offsets: np.ndarray[Any, np.dtype[np.uint64]]) -> bool:
    return bool((np.diff(offsets.astype(np.int64)) == 1).all())
