"""Token-addressable KV caches, as on CUDA: one vector of K and V per token and head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from xxhash import xxh3_64

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.layout import KVLayout
from lmcache_kit.vllm.pages import Pages, Piece

_log = logging.getLogger("vllm.lmcache_kit")


class TokenPages(Pages):
    """``caches``: one ``[blocks, heads, block, 2 * dim]`` view per layer, of any strides, with a
    token's K and V side by side in the last dimension.

    Copies run on a stream of their own that first waits for the model's. They go through one
    buffer on the device in the payload's order, so that each chunk crosses the bus in one copy;
    that copy is asynchronous where the shared memory is pinned.
    """

    def __init__(self, caches: Sequence[torch.Tensor], block_tokens: int) -> None:
        first = caches[0]
        self.blocks, heads, self._block, width = first.shape
        if any(cache.shape != first.shape or cache.dtype != first.dtype for cache in caches):
            raise UnsupportedModel("the layers' KV caches differ in shape or dtype")
        if block_tokens % self._block:
            raise UnsupportedModel(
                f"a block of {block_tokens} tokens is no multiple of the page's {self._block}"
            )
        self.block_tokens = block_tokens
        self._caches = list(caches)
        self._dim = width // 2
        dtype = str(first.dtype).removeprefix("torch.")
        self.layout = KVLayout(dtype, len(caches), heads, self._dim)
        self._dtype, self._device = first.dtype, first.device
        self._stream = torch.cuda.Stream(self._device) if first.is_cuda else None
        self._pinned: tuple[str, torch.Tensor, bool] | None = None

    def use_memory(self, incarnation: str, memory: memoryview) -> None:
        """Pin it, once, so that the device copies to and from it directly."""
        if self._stream is None or (self._pinned and self._pinned[0] == incarnation):
            return
        self.close()
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        status = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)
        if int(status):  # copies work without, at a part of the speed
            _log.warning("could not pin the cache's memory (CUDA error %d)", int(status))
        self._pinned = incarnation, flat, not int(status)

    def close(self) -> None:
        if self._pinned and self._pinned[2]:
            torch.cuda.cudart().cudaHostUnregister(self._pinned[1].data_ptr())
        self._pinned = None

    def gather(self, pieces: Sequence[Piece]) -> list[int]:
        with self._on_stream():
            copied = [self._gather_one(piece) for piece in pieces]
        checksums = []
        for piece, done in zip(pieces, copied, strict=True):
            if done is not None:
                done.synchronize()  # the next chunks are still on their way while this is hashed
            checksums.append(xxh3_64(piece.payload).intdigest())
        return checksums

    def _gather_one(self, piece: Piece) -> torch.cuda.Event | None:
        block, offset = self._slots(piece)
        staged = torch.empty(self._shape(piece), dtype=self._dtype, device=self._device)
        for cache, both in zip(self._caches, staged, strict=True):
            tokens = cache[block, :, offset]  # [tokens, heads, 2 * dim]
            both[0].copy_(tokens[..., : self._dim])
            both[1].copy_(tokens[..., self._dim :])
        self._host(piece).copy_(staged, non_blocking=True)
        return self._stream.record_event() if self._stream is not None else None

    def scatter(self, piece: Piece) -> int:
        with self._on_stream():
            staged = self._host(piece).to(self._device, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            # Read first, then hashed: see the contract.
            digest = int(xxh3_64(piece.payload).intdigest())
            block, offset = self._slots(piece)
            rows = slice(piece.skip, piece.skip + piece.end - piece.start)
            for cache, both in zip(self._caches, staged, strict=True):
                cache[block, :, offset] = torch.cat((both[0, rows], both[1, rows]), dim=-1)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return digest

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        return self.layout.layers, 2, piece.tokens, self.layout.kv_heads, self._dim

    def _host(self, piece: Piece) -> torch.Tensor:
        flat = torch.frombuffer(piece.payload, dtype=self._dtype)
        return flat.view(self._shape(piece))

    def _slots(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and offset in it of each of the piece's tokens, on the device."""
        blocks = torch.as_tensor(piece.blocks, dtype=torch.int64)
        position = torch.arange(piece.start, piece.end)
        ratio = self.block_tokens // self._block
        within = position % self.block_tokens
        page = blocks[position // self.block_tokens] * ratio + within // self._block
        if bool((page < 0).any()) or bool((page >= self.blocks).any()):
            raise IndexError(f"tokens up to {piece.end} are not within the blocks of the KV cache")
        return page.to(self._device), (within % self._block).to(self._device)
