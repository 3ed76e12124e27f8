"""LMCache's CPU backend with its local disk below: write chunks to the disk, and read them back.

The connector copies nothing, so only the path to the disk and back is measured.
Usage: disk.py FOLDER CHUNKS ROUNDS
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time

# SmolLM2-135M: 5.6 MiB for a chunk.
LAYERS, HEADS, WIDTH = 30, 3, 64
CHUNK_TOKENS = 256
WAIT_S = 0.0005


def main(folder: str, chunks: int, rounds: int) -> None:
    logging.disable(logging.WARNING)
    import torch
    from lmcache.v1.cache_engine import LMCacheEngineBuilder
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
    from lmcache.v1.metadata import LMCacheMetadata

    torch.set_num_threads(1)
    tokens = chunks * CHUNK_TOKENS
    nbytes = 2 * LAYERS * HEADS * WIDTH * 2 * tokens

    class Nowhere(GPUConnectorInterface):
        def to_gpu(self, memory_obj, start, end, **kwargs):
            pass

        def from_gpu(self, memory_obj, start, end, **kwargs):
            pass

        def batched_to_gpu(self, memory_objs, starts, ends, **kwargs):
            pass

        def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
            pass

        def get_shape(self, num_tokens):
            return torch.Size([2, LAYERS, num_tokens, HEADS * WIDTH])

    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK_TOKENS,
        local_cpu=True,
        max_local_cpu_size=1.5 * nbytes / 2**30,
        local_disk=f"file://{folder}/",
        max_local_disk_size=8,
    )
    metadata = LMCacheMetadata(
        "synthetic", 1, 1, 0, 0, torch.bfloat16, (LAYERS, 2, CHUNK_TOKENS, HEADS, WIDTH),
        chunk_size=CHUNK_TOKENS,
    )  # fmt: skip
    engine = LMCacheEngineBuilder.get_or_create(
        "benchmark", config, metadata, Nowhere(), lambda tensor, source: tensor,
        lambda value, source: value,
    )  # fmt: skip
    engine.post_init()
    disk = engine.storage_manager.storage_backends["LocalDiskBackend"]
    prompt = torch.randint(0, 100_000, (tokens,)).tolist()
    slots = torch.arange(tokens)
    down_s, back_s = [], []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        engine.store(prompt, slot_mapping=slots)
        while len(disk.dict) < chunks or disk.disk_worker.put_tasks:
            time.sleep(WAIT_S)
        middle = time.perf_counter()
        engine.clear(locations=["LocalCPUBackend"])
        memory = engine.storage_manager.storage_backends["LocalCPUBackend"]
        assert not memory.hot_cache
        begin_again = time.perf_counter()
        mask = engine.retrieve(prompt, slot_mapping=slots)
        end = time.perf_counter()
        assert int(mask.sum()) == tokens
        engine.clear()
        for key in list(disk.dict):
            disk.remove(key)
        if number:
            down_s.append(middle - begin)
            back_s.append(end - begin_again)
    figures = {
        "down_gb_s": nbytes / 1e9 / statistics.median(down_s),
        "back_gb_s": nbytes / 1e9 / statistics.median(back_s),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # LMCache leaves threads running
