"""vLLM's KV pages on CUDA: addressable by token, with one vector of K and V per token and head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from xxhash import xxh3_64

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.layout import KVLayout
from lmcache_kit.vllm.kv_pages import KVPages, TransferSpec

_log = logging.getLogger("vllm.lmcache_kit")


class CUDAPages(KVPages):
    """KV pages in which each token can be indexed; CPU tensors work too.

    ``caches`` holds one ``[blocks, heads, block, 2 * dim]`` view per layer, of any strides, with a
    token's K and V side by side in the last dimension.

    Copies run on a stream of their own that first waits for the model's stream. A chunk is staged
    on the device in the payload's order, so that it crosses the bus in one copy. That copy is
    asynchronous where the shared memory is pinned.
    """

    def __init__(self, caches: Sequence[torch.Tensor], block_tokens: int) -> None:
        first = caches[0]
        self.blocks, heads, self._block, width = first.shape
        if any(cache.shape != first.shape or cache.dtype != first.dtype for cache in caches):
            found = {(tuple(cache.shape), str(cache.dtype)) for cache in caches}
            raise UnsupportedModel(
                f"its layers' KV caches differ: {sorted(found)}; one shape and dtype is supported"
            )
        if block_tokens % self._block:
            raise UnsupportedModel(
                f"its blocks of {block_tokens} tokens are no multiple of a page of {self._block}"
            )
        self.block_tokens = block_tokens
        self._caches = list(caches)
        self._dim = width // 2
        dtype = str(first.dtype).removeprefix("torch.")
        self.layout = KVLayout(dtype, len(caches), heads, self._dim)
        self._dtype, self._device = first.dtype, first.device
        self._stream = torch.cuda.Stream(self._device) if first.is_cuda else None
        self._pinned: tuple[str, torch.Tensor, bool] | None = None

    def register_memory(self, incarnation: str, memory: memoryview) -> None:
        """Pin the memory, once, so that the device copies to and from it directly."""
        if self._stream is None or (self._pinned and self._pinned[0] == incarnation):
            return
        self.close()
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        status = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)
        if int(status):
            _log.warning(
                "could not pin the %d bytes of shared memory (CUDA error %d); copies still work, "
                "at a fraction of the speed",
                flat.numel(), int(status),
            )  # fmt: skip
        self._pinned = incarnation, flat, not int(status)

    def close(self) -> None:
        if self._pinned and self._pinned[2]:
            torch.cuda.cudart().cudaHostUnregister(self._pinned[1].data_ptr())
        self._pinned = None

    def gather(self, transfers: Sequence[TransferSpec]) -> list[int]:
        with self._on_stream():
            copied = [self._gather_one(transfer) for transfer in transfers]
        checksums = []
        for transfer, done in zip(transfers, copied, strict=True):
            if done is not None:
                done.synchronize()  # the next chunks are still being copied while this is hashed
            checksums.append(xxh3_64(transfer.payload).intdigest())
        return checksums

    def _gather_one(self, transfer: TransferSpec) -> torch.cuda.Event | None:
        block, offset = self._slots(transfer)
        staged = torch.empty(self._shape(transfer), dtype=self._dtype, device=self._device)
        for cache, kv in zip(self._caches, staged, strict=True):
            tokens = cache[block, :, offset]  # [tokens, heads, 2 * dim]
            kv[0].copy_(tokens[..., : self._dim])
            kv[1].copy_(tokens[..., self._dim :])
        self._host(transfer).copy_(staged, non_blocking=True)
        return self._stream.record_event() if self._stream is not None else None

    def scatter(self, transfer: TransferSpec) -> int:
        with self._on_stream():
            staged = self._host(transfer).to(self._device, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            # Hash after the read, as KVPages.scatter promises.
            digest = int(xxh3_64(transfer.payload).intdigest())
            block, offset = self._slots(transfer)
            rows = slice(transfer.skip, transfer.skip + transfer.end - transfer.start)
            for cache, kv in zip(self._caches, staged, strict=True):
                cache[block, :, offset] = torch.cat((kv[0, rows], kv[1, rows]), dim=-1)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return digest

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        stream: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def _shape(self, transfer: TransferSpec) -> tuple[int, ...]:
        return self.layout.layers, 2, transfer.tokens, self.layout.kv_heads, self._dim

    def _host(self, transfer: TransferSpec) -> torch.Tensor:
        flat = torch.frombuffer(transfer.payload, dtype=self._dtype)
        return flat.view(self._shape(transfer))

    def _slots(self, transfer: TransferSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the page of each of the transfer's tokens and its offset there, on the device."""
        blocks = torch.as_tensor(transfer.blocks, dtype=torch.int64)
        position = torch.arange(transfer.start, transfer.end)
        ratio = self.block_tokens // self._block
        within = position % self.block_tokens
        page = blocks[position // self.block_tokens] * ratio + within // self._block
        if bool((page < 0).any()) or bool((page >= self.blocks).any()):
            raise IndexError(
                f"tokens up to {transfer.end} are not within the blocks of the KV cache"
            )
        return page.to(self._device), (within % self._block).to(self._device)
