"""LMCache's CPU backend: store and retrieve of one prompt's KV from paged CPU tensors.

Uses LMCache's portable layout and copy code for CPU tensors, on one thread.
Usage: store.py LAYERS KV_HEADS HEAD_DIM TOKENS
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time

CHUNK_TOKENS = 256
BLOCK_TOKENS = 128
ROUNDS = 5


def main(layers: int, heads: int, width: int, tokens: int) -> None:
    logging.disable(logging.WARNING)
    import lmcache.lmcache_native as native
    import torch
    from lmcache import device_ops
    from lmcache.v1.cache_engine import LMCacheEngineBuilder
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
    from lmcache.v1.metadata import LMCacheMetadata

    torch.set_num_threads(1)
    nbytes = 2 * layers * heads * width * 2 * tokens
    pages = [torch.randn(2, tokens, heads * width).to(torch.bfloat16) for _ in range(layers)]
    slots = torch.arange(tokens)

    class Pages(GPUConnectorInterface):
        def _copy(self, memory, start, end, direction):
            device_ops.multi_layer_kv_transfer(
                memory.tensor, pages, slots[start:end], torch.device("cpu"), tokens, direction,
                native.EngineKVFormat.NL_X_TWO_NB_BS_NH_HS, BLOCK_TOKENS, width,
            )  # fmt: skip

        def to_gpu(self, memory_obj, start, end, **kwargs):
            self._copy(memory_obj, start, end, native.TransferDirection.H2D)

        def from_gpu(self, memory_obj, start, end, **kwargs):
            self._copy(memory_obj, start, end, native.TransferDirection.D2H)

        def batched_to_gpu(self, memory_objs, starts, ends, **kwargs):
            for memory, start, end in zip(memory_objs, starts, ends, strict=True):
                self.to_gpu(memory, start, end)

        def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
            for memory, start, end in zip(memory_objs, starts, ends, strict=True):
                self.from_gpu(memory, start, end)

        def get_shape(self, num_tokens):
            return torch.Size([2, layers, num_tokens, heads * width])

    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK_TOKENS, local_cpu=True, max_local_cpu_size=max(0.5, 1.3 * nbytes / 2**30)
    )
    metadata = LMCacheMetadata(
        "synthetic", 1, 1, 0, 0, torch.bfloat16, (layers, 2, CHUNK_TOKENS, heads, width),
        chunk_size=CHUNK_TOKENS,
    )  # fmt: skip
    engine = LMCacheEngineBuilder.get_or_create(
        "benchmark", config, metadata, Pages(), lambda tensor, source: tensor,
        lambda value, source: value,
    )  # fmt: skip
    engine.post_init()
    prompt = torch.randint(0, 100_000, (tokens,)).tolist()
    stored_s, retrieved_s = [], []
    for number in range(ROUNDS + 1):
        engine.clear()
        begin = time.perf_counter()
        engine.store(prompt, slot_mapping=slots)
        if number:
            stored_s.append(time.perf_counter() - begin)
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        mask = engine.retrieve(prompt, slot_mapping=slots)
        retrieved_s.append(time.perf_counter() - begin)
        assert int(mask.sum()) == tokens
    figures = {
        "store_gb_s": nbytes / 1e9 / statistics.median(stored_s),
        "load_gb_s": nbytes / 1e9 / statistics.median(retrieved_s),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
    os._exit(0)  # LMCache leaves threads running
