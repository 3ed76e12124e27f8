"""Tiers below memory: what they cost a lookup that memory can answer, and how fast chunks go down
to a disk and come back, beside plain files and memcpy.

Per round, in random order of the two caches: the same chunks are stored, looked up in memory,
written to the disk, forgotten and looked up again. Files are in the page cache, so it is the way
that is measured, not the disk. Ratios are of medians; in brackets, the range of the rounds' own.
LMCache's local disk does the same in the same run where `make lmcache` has installed it.

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
SPACE = bytes(32)
CHUNK = 256
WAIT_S = 120.0


def no_codec(name: str) -> Codec:
    raise ConfigError(name)


class Cache:
    """With a disk below it, or without."""

    def __init__(self, chunks: int, nbytes: int, folder: Path | None) -> None:
        self.nbytes = nbytes
        self.memory = LocalCPUBackend(chunks * (nbytes + 4096) + MIB)
        self.engine = CacheEngine(self.memory, LRU(), location="memory")
        self.tier: StoreTier | None = None
        if folder is not None:
            store = LocalDiskBackend(DiskOptions(path=folder, max_size_gib=8))
            self.tier = StoreTier(store, LRU(), location="disk", get_codec=no_codec)
            self.engine.subscribe(self.engine.attach([self.tier], no_codec))
        self.tokens = pack_tokens(range(chunks * CHUNK))
        self.items = [
            StoreItem(link.parent, self.tokens[link.start * 4 : link.end * 4], nbytes, link.start)
            for link in chain(SPACE, self.tokens, CHUNK)
        ]
        self.payload = os.urandom(nbytes)
        self.checksum = xxh3_64_intdigest(self.payload)

    def store(self) -> float:
        grants = self.engine.allocate(SPACE, 0, 1, CHUNK, self.items, "worker")
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
        match = self.engine.lookup(SPACE, self.tokens, CHUNK, 1, "scheduler", WAIT_S)
        spent = time.perf_counter() - begun
        assert len(match.chunks) == len(self.items)
        self.engine.release(match.lease, None)
        return spent

    def forget(self) -> None:
        self.engine.clear()

    def forget_all(self) -> None:
        self.engine.clear()
        if self.tier is not None:
            self.tier.clear()

    def close(self) -> None:
        if self.engine.lower_tiers:
            self.engine.lower_tiers.close()
        self.engine.close()


def plain(folder: Path, source: memoryview, target: memoryview, nbytes: int) -> tuple[float, float]:
    """Write files and read them, with nothing else."""
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
    asked = parser.parse_args()
    nbytes = int(asked.chunk_mib * MIB) // 4096 * 4096
    total = asked.chunks * nbytes
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        alone = Cache(asked.chunks, nbytes, None)
        tiered = Cache(asked.chunks, nbytes, folder / "kv")
        # Aligned to pages, as the cache's memory is: the kernel copies three times as fast then.
        source, target = (memoryview(mmap.mmap(-1, total)) for _ in range(2))
        source[:] = (os.urandom(MIB) * (total // MIB + 1))[:total]
        for round_ in range(asked.rounds + 1):
            begun = time.perf_counter()
            target[:] = source
            seen = {"memcpy": time.perf_counter() - begun}
            seen["plain write"], seen["plain read"] = plain(folder, source, target, nbytes)
            for cache, who in random.sample([(alone, "without"), (tiered, "with")], 2):
                committed = cache.store()
                seen["write"] = committed + cache.flush() if who == "with" else seen.get("write", 0)
                seen[f"hit {who}"] = min(cache.look_up() for _ in range(20))
                if who == "with":
                    cache.forget()
                    seen["promote"] = cache.look_up()
                cache.forget_all()
            if round_:  # the first one touches memory and files for the first time
                for what, seconds in seen.items():
                    note(what, seconds)
        alone.close()
        tiered.close()
        (folder / "lmcache").mkdir()
        theirs = lmcache_baseline.measure("disk", folder / "lmcache", asked.chunks, asked.rounds)

    def ratio(one: str, other: str) -> str:
        own = sorted(a / b for a, b in zip(times[other], times[one], strict=True))
        middle = median(times[other]) / median(times[one])
        return f"{middle:.2f} [{own[0]:.2f} to {own[-1]:.2f}]"

    def speed(what: str) -> str:
        return f"{total / median(times[what]) / 1e9:.2f} GB/s"

    us = {who: median(times[f"hit {who}"]) * 1e6 for who in ("without", "with")}
    rows = {
        "memcpy": speed("memcpy"),
        "plain write": speed("plain write"),
        "plain read": speed("plain read"),
        "to the tier": f"{speed('write')}, of a plain write {ratio('write', 'plain write')}",
        "back into memory": (
            f"{speed('promote')}, of a plain read {ratio('promote', 'plain read')}"
        ),
        "a hit in memory": f"{us['without']:.0f} us without tiers, {us['with']:.0f} us with, "
        f"{ratio('hit without', 'hit with')}",
    }
    if theirs:
        ours = {way: total / median(times[way]) / 1e9 for way in ("write", "promote")}
        rows["LMCache, to disk"] = (
            f"{theirs['down_gb_s']:.2f} GB/s, ours {ours['write'] / theirs['down_gb_s']:.2f} of it"
        )
        rows["LMCache, back"] = (
            f"{theirs['back_gb_s']:.2f} GB/s, "
            f"ours {ours['promote'] / theirs['back_gb_s']:.2f} of it"
        )
    print(f"{asked.chunks} x {nbytes / MIB:.1f} MiB, {asked.rounds} rounds")
    for what, seen_ in rows.items():
        print(f"{what:18} {seen_}")


if __name__ == "__main__":
    main()
