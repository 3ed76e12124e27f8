"""The cost of encoding chunks in place, and of a lookup that has to decode them.

    python benchmarks/encoded_chunks.py [--method cachegen] [--chunks 24] [--rounds 5]

Chunks of 256 tokens in the shape of SmolLM2-135M (30 layers, 3 x 64, bfloat16), filled with noise
around a mean per channel; a codec does better on real KV. Encoding includes a check that the blob
can be decoded. vLLM is not needed.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import numpy as np
from lmcache_kit_cpu_backend.backend import LocalCPUBackend
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.interfaces import Region, Rope
from lmcache_kit.keys import chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.plugins import Plugins
from lmcache_kit.service.codecs import Codecs

DIGEST = bytes(32)
CHUNK = 256
RANK_LAYOUT = RankLayout(KVLayout("bfloat16", 30, 3, 64), Rope(64, 100_000.0))


def payload(random: np.random.Generator) -> bytes:
    layout = RANK_LAYOUT.layout
    shape = (layout.layers, 2, CHUNK, layout.kv_heads, layout.head_dim)
    means = random.normal(size=(layout.layers, 2, 1, layout.kv_heads, layout.head_dim))
    values = (random.normal(size=shape) + 2 * means).astype(np.float32)
    return bytes((values.view(np.uint32) >> 16).astype("<u2"))


def store(engine: CacheEngine, memory: LocalCPUBackend, chunks: int) -> bytes:
    random = np.random.default_rng(0)
    tokens = pack_tokens(range(chunks * CHUNK))
    nbytes = RANK_LAYOUT.layout.payload_bytes(CHUNK)
    items = [
        StoreItem(link.parent, tokens[link.start * 4 : link.end * 4], nbytes, link.start)
        for link in chain(DIGEST, tokens, CHUNK)
    ]
    written = []
    for grant in engine.allocate(DIGEST, 0, 1, CHUNK, items, "bench", RANK_LAYOUT):
        data = payload(random)
        memory.view(Region(grant.offset, nbytes))[:] = data
        written.append((grant.ticket, xxh3_64_intdigest(data)))
    engine.commit(written, "bench")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="cachegen")
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    codec = Codecs(Plugins.load()).get(options.method)
    nbytes = options.chunks * RANK_LAYOUT.layout.payload_bytes(CHUNK)
    memory = LocalCPUBackend(2 * nbytes)
    engine = CacheEngine(memory, LRU(), location="bench")
    tokens = store(engine, memory, options.chunks)
    keys = [key for key, _ in engine.memory_tier.keys(None, None)]

    start = time.perf_counter()
    results = [engine.memory_tier.encode(key, options.method, codec) for key in keys]
    took_s = time.perf_counter() - start
    after = sum(result.bytes_after for result in results)
    print(f"{options.chunks} chunks, {nbytes / 1e6:.0f} MB, on {os.cpu_count()} cores")
    print(f"encode, one thread   {nbytes / 1e6 / took_s:.0f} MB/s, ratio {nbytes / after:.2f}")

    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        match = engine.lookup(DIGEST, tokens, CHUNK, 1, "bench", 60)
        times.append(time.perf_counter() - start)
        assert len(match.chunks) == options.chunks
        engine.release(match.lease, None)
    rate = nbytes / 1e6 / median(times)
    print(
        f"lookup that decodes  {median(times) * 1e3:.0f} ms (worst {max(times) * 1e3:.0f}), "
        f"{rate:.0f} MB/s, {CHUNK * options.chunks / median(times):.0f} tokens/s"
    )
    engine.close()


if __name__ == "__main__":
    main()
