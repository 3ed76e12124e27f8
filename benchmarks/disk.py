"""LocalDiskBackend beside plain files and memcpy, and the alternatives that its design rejects.

Each round measures, in random order: memcpy, plain reads and writes, the backend, and other ways to
read and write. Reads copy to another buffer, as the cache process does. "Cold" means that the files
were flushed and dropped from the page cache. Ratios are of medians; brackets hold the range of the
rounds' own ratios.

    python benchmarks/disk.py [--folder /var/tmp] [--rounds 11] [--sustained-gib 0] [--blobs 10000]

``--sustained-gib``: size of one long write, measured in three ways. ``--blobs``: number of small
blobs in the store whose start is measured.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions
from xxhash import xxh3_64_intdigest

from lmcache_kit.interfaces import OpenBlob

MIB = 1 << 20
PAYLOADS = {"32 x 5.6 MiB": (32, 1440 * 4096), "8 x 32 MiB": (8, 32 * MIB)}
META = bytes(300)
NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

Times = dict[str, list[float]]


class Bench:
    """``count`` sources of ``size`` bytes in memory, as many targets, and as many files."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.total = count * size
        self.sources = list(pieces(count, size))
        self.targets = list(pieces(count, size))
        for number, source in enumerate(self.sources):
            source[:] = os.urandom(MIB)[:4096] * (size // 4096)
            source[:8] = number.to_bytes(8)
        self.paths = [folder / f"plain-{number}" for number in range(count)]
        self.keys = [number.to_bytes(16) for number in range(count)]
        self.store = LocalDiskBackend(DiskOptions(path=folder / "store", max_size_gib=4))
        self.times: Times = {}

    def timed(self, name: str, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        self.times.setdefault(name, []).append(time.perf_counter() - begun)

    def round(self) -> None:
        for name, work in shuffled({"memcpy": self.copy, "xxh3 of the bytes": self.hash}):
            self.timed(name, work)
        writes = {
            "plain write": self.write,
            "put": self.put,
            "plain write, O_DIRECT": lambda: self.write(os.O_DIRECT),
            "plain write, DONTNEED": lambda: self.write(drop=True),
            "plain write, fdatasync, DONTNEED": lambda: self.write(flush=True, drop=True),
        }
        for name, work in shuffled(writes):
            self.clear()
            self.timed(name, work)
        self.clear()
        self.write()
        self.put()
        reads = {"plain read": self.read, "get": self.get}
        for name, work in shuffled(reads):
            self.timed(f"{name}, warm", work)
        for name, work in shuffled({**reads, "plain read, O_DIRECT": self.read_directly}):
            self.cool()
            self.timed(f"{name}, cold", work)
        assert all(
            source == target for source, target in zip(self.sources, self.targets, strict=True)
        )

    def clear(self) -> None:
        """Delete all files, and wait for pending writes of the system."""
        for path in self.paths:
            path.unlink(missing_ok=True)
        self.store.remove(self.keys)
        os.sync()

    def cool(self) -> None:
        for path in [*self.paths, *self.stored()]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def stored(self) -> Iterator[Path]:
        return (self.paths[0].parent / "store").glob("*/*/*")

    def copy(self) -> None:
        for source, target in zip(self.sources, self.targets, strict=True):
            target[:] = source

    def hash(self) -> None:
        for source in self.sources:
            xxh3_64_intdigest(source)

    def write(self, flags: int = 0, *, flush: bool = False, drop: bool = False) -> None:
        for path, source in zip(self.paths, self.sources, strict=True):
            write_file(path, source, flags, flush=flush, drop=drop)

    def put(self) -> None:
        for key, source in zip(self.keys, self.sources, strict=True):
            assert self.store.put(key, META, [source])

    def read(self) -> None:
        for path, target in zip(self.paths, self.targets, strict=True):
            fd = os.open(path, os.O_RDONLY)
            assert os.preadv(fd, [target], 0) == len(target)
            os.close(fd)

    def read_directly(self) -> None:
        for path, target in zip(self.paths, self.targets, strict=True):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            assert os.preadv(fd, [target], 0) == len(target)
            os.close(fd)

    def get(self) -> None:
        for key, target in zip(self.keys, self.targets, strict=True):
            blob = self.store.get(key)
            assert isinstance(blob, OpenBlob)
            with closing(blob.file) as file:
                assert file.readinto(target) == len(target)


def shuffled(works: dict[str, Callable[[], None]]) -> list[tuple[str, Callable[[], None]]]:
    """Return the work in random order, for the state of the disk changes during a round."""
    return random.sample(list(works.items()), len(works))


def pieces(count: int, size: int) -> Iterator[memoryview]:
    """Return slices of shared memory like that of the cache process."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, count * size)
    memory = memoryview(mmap.mmap(fd, count * size))
    os.close(fd)
    memory[:] = bytes(count * size)
    return (memory[at : at + size] for at in range(0, count * size, size))


def write_file(
    path: Path, source: memoryview, flags: int = 0, *, flush: bool = False, drop: bool = False
) -> None:
    fd = os.open(path, NEW | flags, 0o600)
    assert os.write(fd, source) == len(source)
    if flush:
        os.fdatasync(fd)
    if drop:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def show(name: str, bench: Bench) -> None:
    print(f"\n{name}")
    for what, times in sorted(bench.times.items()):
        baseline = "memcpy"
        if what.startswith(("put", "plain write,")):
            baseline = "plain write"
        elif what.startswith(("get", "plain read,")):
            baseline = f"plain read, {what.rsplit(' ', 1)[1]}"
        ratios = sorted(base / own for base, own in zip(bench.times[baseline], times, strict=True))
        ratio = median(bench.times[baseline]) / median(times)
        print(
            f"  {what:34} {median(times) * 1e3:7.1f} ms {bench.total / median(times) / 1e9:6.2f} "
            f"GB/s   {ratio:.2f} [{ratios[0]:.2f} to {ratios[-1]:.2f}] of {baseline}"
        )


def sustained(folder: Path, nbytes: int) -> None:
    [source] = pieces(1, 32 * MIB)
    print(f"\n{nbytes / 2**30:.1f} GiB in one go, in files of 32 MiB")
    for name, flags, drop in (
        ("page cache", 0, False), ("O_DIRECT", os.O_DIRECT, False), ("DONTNEED", 0, True),
    ):  # fmt: skip
        os.sync()
        before, begun = cached_bytes(), time.perf_counter()
        paths = [folder / f"long-{number}" for number in range(nbytes // len(source))]
        for path in paths:
            write_file(path, source, flags, drop=drop)
        took = time.perf_counter() - begun
        grown = (cached_bytes() - before) / 2**30
        print(f"  {name:11} {nbytes / took / 1e9:.2f} GB/s; page cache {grown:+.1f} GiB")
        for path in paths:
            path.unlink()


def cached_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Cached:"))


def starting(folder: Path, blobs: int) -> None:
    options = DiskOptions(path=folder / "many", max_size_gib=64)
    store = LocalDiskBackend(options)
    begun = time.perf_counter()
    for number in range(blobs):
        store.put(number.to_bytes(16)[::-1], META, [memoryview(META)])
    put = time.perf_counter() - begun
    store.close()
    begun = time.perf_counter()
    store = LocalDiskBackend(options)
    opened = time.perf_counter() - begun
    begun = time.perf_counter()
    assert sum(1 for _ in store.scan()) == blobs
    scanned = time.perf_counter() - begun
    store.close()
    print(f"\n{blobs} blobs: put {put:.2f} s, start {opened:.2f} s, scan {scanned:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sustained-gib", type=float, default=0)
    parser.add_argument("--blobs", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for payload, (count, size) in PAYLOADS.items():
            bench = Bench(folder, count, size)
            for _ in range(options.rounds):
                bench.round()
            bench.clear()
            bench.store.close()
            show(payload, bench)
        if options.sustained_gib:
            sustained(folder, int(options.sustained_gib * 2**30))
        starting(folder, options.blobs)


if __name__ == "__main__":
    main()
