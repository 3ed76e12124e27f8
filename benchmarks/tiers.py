"""Lower tiers: their cost for a hit in memory, and the speed of offload and promotion.

The baselines are plain files and memcpy. Each round runs these steps with a disk below memory and
without, in random order: store chunks, look them up in memory, offload them, delete them from
memory, and look them up again. Files are in the page cache, so the path is measured and not the
disk. Ratios are of medians; brackets hold the range of the rounds' own ratios. LMCache's local disk
is measured in the same run if `make lmcache` has installed LMCache.

    python benchmarks/tiers.py [--folder /var/tmp] [--rounds 11] [--chunks 32] [--chunk-mib 5.6]
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import lmcache_baseline
from lmcache_kit_cpu_backend.backend import LocalCPUBackend
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.errors import ConfigError
from lmcache_kit.interfaces import Region
from lmcache_kit.interfaces.codec import Codec
from lmcache_kit.keys import chain, pack_tokens

MIB = 1 << 20
DIGEST = bytes(32)
CHUNK = 256
WAIT_S = 120.0


def no_codec(name: str) -> Codec:
    raise ConfigError(name)


class Cache:
    """A memory tier with a disk tier below it, or without."""

    def __init__(self, chunks: int, nbytes: int, folder: Path | None) -> None:
        self.nbytes = nbytes
        self.memory = LocalCPUBackend(chunks * (nbytes + 4096) + MIB)
        self.engine = CacheEngine(self.memory, LRU(), location="memory")
        self.tier: StoreTier | None = None
        if folder is not None:
            store = LocalDiskBackend(DiskOptions(path=folder, max_size_gib=8))
            self.tier = StoreTier(store, LRU(), location="disk", get_codec=no_codec)
            self.engine.memory_tier.subscribe(self.engine.attach([self.tier], no_codec))
        self.tokens = pack_tokens(range(chunks * CHUNK))
        self.items = [
            StoreItem(link.parent, self.tokens[link.start * 4 : link.end * 4], nbytes, link.start)
            for link in chain(DIGEST, self.tokens, CHUNK)
        ]
        self.payload = os.urandom(nbytes)
        self.checksum = xxh3_64_intdigest(self.payload)

    def store(self) -> float:
        grants = self.engine.allocate(DIGEST, 0, 1, CHUNK, self.items, "worker")
        for grant in grants:
            self.memory.view(Region(grant.offset, self.nbytes))[:] = self.payload
        begun = time.perf_counter()
        self.engine.commit([(grant.ticket, self.checksum) for grant in grants], "worker")
        return time.perf_counter() - begun

    def flush(self) -> float:
        begun = time.perf_counter()
        if self.tier is not None:
            assert self.tier.executor.flush(WAIT_S)
        return time.perf_counter() - begun

    def look_up(self) -> float:
        begun = time.perf_counter()
        match = self.engine.lookup(DIGEST, self.tokens, CHUNK, 1, "scheduler", WAIT_S)
        spent = time.perf_counter() - begun
        assert len(match.chunks) == len(self.items)
        self.engine.release(match.lease, None)
        return spent

    def clear_memory(self) -> None:
        self.engine.memory_tier.clear()

    def clear(self) -> None:
        self.engine.memory_tier.clear()
        if self.tier is not None:
            self.tier.clear()

    def close(self) -> None:
        if self.engine.lower_tiers:
            self.engine.lower_tiers.close()
        self.engine.close()


def plain(folder: Path, source: memoryview, target: memoryview, nbytes: int) -> tuple[float, float]:
    """Return the seconds of writing plain files and of reading them."""
    paths = [folder / f"plain-{at}" for at in range(0, len(source), nbytes)]
    begun = time.perf_counter()
    for number, path in enumerate(paths):
        path.write_bytes(source[number * nbytes : (number + 1) * nbytes])
    middle = time.perf_counter()
    for number, path in enumerate(paths):
        with path.open("rb", buffering=0) as file:
            file.readinto(target[number * nbytes : (number + 1) * nbytes])
    end = time.perf_counter()
    for path in paths:
        path.unlink()
    return middle - begun, end - middle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--chunk-mib", type=float, default=5.6)
    options = parser.parse_args()
    nbytes = int(options.chunk_mib * MIB) // 4096 * 4096
    total = options.chunks * nbytes
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        alone = Cache(options.chunks, nbytes, None)
        tiered = Cache(options.chunks, nbytes, folder / "kv")
        # The cache's memory is aligned to pages; the kernel copies such memory three times as fast.
        source, target = (memoryview(mmap.mmap(-1, total)) for _ in range(2))
        source[:] = (os.urandom(MIB) * (total // MIB + 1))[:total]
        for round_ in range(options.rounds + 1):
            begun = time.perf_counter()
            target[:] = source
            seen = {"memcpy": time.perf_counter() - begun}
            seen["plain write"], seen["plain read"] = plain(folder, source, target, nbytes)
            for cache, which in random.sample([(alone, "without"), (tiered, "with")], 2):
                committed = cache.store()
                seen["write"] = (
                    committed + cache.flush() if which == "with" else seen.get("write", 0)
                )
                seen[f"hit {which}"] = min(cache.look_up() for _ in range(20))
                if which == "with":
                    cache.clear_memory()
                    seen["promote"] = cache.look_up()
                cache.clear()
            if round_:  # the first round touches memory and files for the first time
                for what, seconds in seen.items():
                    note(what, seconds)
        alone.close()
        tiered.close()
        (folder / "lmcache").mkdir()
        lmcache = lmcache_baseline.measure(
            "disk", folder / "lmcache", options.chunks, options.rounds
        )

    def ratio(one: str, other: str) -> str:
        own = sorted(a / b for a, b in zip(times[other], times[one], strict=True))
        middle = median(times[other]) / median(times[one])
        return f"{middle:.2f} [{own[0]:.2f} to {own[-1]:.2f}]"

    def speed(what: str) -> str:
        return f"{total / median(times[what]) / 1e9:.2f} GB/s"

    us = {which: median(times[f"hit {which}"]) * 1e6 for which in ("without", "with")}
    rows = {
        "memcpy": speed("memcpy"),
        "plain write": speed("plain write"),
        "plain read": speed("plain read"),
        "offload": f"{speed('write')}, of a plain write {ratio('write', 'plain write')}",
        "promotion": (f"{speed('promote')}, of a plain read {ratio('promote', 'plain read')}"),
        "hit in memory": f"{us['without']:.0f} us without tiers, {us['with']:.0f} us with, "
        f"{ratio('hit without', 'hit with')}",
    }
    if lmcache:
        ours = {way: total / median(times[way]) / 1e9 for way in ("write", "promote")}
        rows["LMCache, offload"] = (
            f"{lmcache['down_gb_s']:.2f} GB/s, "
            f"the kit {ours['write'] / lmcache['down_gb_s']:.2f} of it"
        )
        rows["LMCache, promotion"] = (
            f"{lmcache['back_gb_s']:.2f} GB/s, "
            f"the kit {ours['promote'] / lmcache['back_gb_s']:.2f} of it"
        )
    print(f"{options.chunks} x {nbytes / MIB:.1f} MiB, {options.rounds} rounds")
    for what, seen_ in rows.items():
        print(f"{what:18} {seen_}")


if __name__ == "__main__":
    main()
