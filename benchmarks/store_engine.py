"""The cost of the cache engine itself: lookup, allocate and commit, without any bytes.

    python benchmarks/store_engine.py [--capacity-gib 5] [--rounds 200]

Prints milliseconds per call, median and worst. Chunks have 256 tokens; a batch has 32 of them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from statistics import median

from lmcache_kit_cpu_backend.backend import LocalCPUBackend

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.keys import chain, pack_tokens

DIGEST = bytes(32)
CHUNK = 256
BATCH = 32
MIB = 1 << 20


def prompt(chunks: int) -> bytes:
    return pack_tokens([random.randrange(1 << 17) for _ in range(chunks * CHUNK)])


def items_of(tokens: bytes, sizes: Sequence[int]) -> list[StoreItem]:
    return [
        StoreItem(link.parent, tokens[link.start * 4 : link.end * 4], random.choice(sizes))
        for link in chain(DIGEST, tokens, CHUNK)
    ]


def store(engine: CacheEngine, sizes: Sequence[int], rounds: int, chunks: int = BATCH) -> str:
    allocating: list[float] = []
    committing: list[float] = []
    for _ in range(rounds):
        items = items_of(prompt(chunks), sizes)
        start = time.perf_counter()
        grants = engine.allocate(DIGEST, 0, 1, CHUNK, items, "bench")
        allocating.append((time.perf_counter() - start) * 1e3)
        written = [(grant.ticket, 0) for grant in grants]
        start = time.perf_counter()
        engine.commit(written, "bench")
        committing.append((time.perf_counter() - start) * 1e3)
    return f"allocate {show(allocating)}   commit {show(committing)}"


def show(times: list[float]) -> str:
    return f"{median(times):.3f} (worst {max(times):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity-gib", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    random.seed(1)
    capacity = int(options.capacity_gib * 1024) * MIB
    engine = CacheEngine(LocalCPUBackend(capacity), LRU(), location="LocalCPUBackend")
    fill = capacity // (BATCH * MIB)
    print(f"into free memory, 1 MiB each      {store(engine, [MIB], fill)}")
    print(f"into full memory, 1 MiB each      {store(engine, [MIB], options.rounds)}")

    tokens = prompt(128)
    grants = engine.allocate(DIGEST, 0, 1, CHUNK, items_of(tokens, [MIB]), "bench")
    engine.commit([(grant.ticket, 0) for grant in grants], "bench")
    looking: list[float] = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        match = engine.lookup(DIGEST, tokens, CHUNK, 1, "bench")
        engine.release(match.lease, 0)
        looking.append((time.perf_counter() - start) * 1e3)
        assert len(match.chunks) == 128
    print(f"lookup and release of 128 chunks  {show(looking)}")

    mixed = [step * MIB // 32 for step in range(1, 33)]
    store(engine, mixed, 2 * fill)  # until the memory is thoroughly fragmented
    print(f"into full memory, 32 KiB to 1 MiB {store(engine, mixed, options.rounds)}")
    stats = engine.stats()
    print(
        f"{stats['chunks']:.0f} chunks in {stats['requested_bytes'] / stats['capacity_bytes']:.1%} "
        f"of the memory; {stats['evicted_for_space_total'] / stats['evicted_chunks_total']:.1%} "
        "of the evictions were for space"
    )
    engine.close()


if __name__ == "__main__":
    main()
