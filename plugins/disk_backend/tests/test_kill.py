"""A process that is killed leaves whole blobs, and all that it has put."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from plugins.disk_backend.tests.blobs import plain

if TYPE_CHECKING:
    from lmcache_kit_disk_backend.backend import LocalDiskBackend

KILLS = 12
CAPACITY_BYTES = 64 << 20
WRITER = """
import random, sys, threading
from pathlib import Path
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions

store = LocalDiskBackend(DiskOptions(path=Path(sys.argv[1]), max_size_gib=1 / 16))
life = int(sys.argv[2])

def write(thread):
    # Each thread has keys of its own, so that the last that it reports is the last that it put.
    draw = random.Random(life * 2 + thread)
    for number in range(1_000_000):
        key = bytes([thread, draw.randrange(8)]) * 8
        seed = (life * 2 + thread) << 24 | number
        size = draw.choice([0, 100, 5000, 300_000, 2_000_000])
        data = random.Random(seed).randbytes(size)
        assert store.put(key, f"{seed} {size}".encode(), [memoryview(data)])
        sys.stdout.write(f"{key.hex()} {seed}\\n")
        sys.stdout.flush()

for thread in range(2):
    threading.Thread(target=write, args=(thread,)).start()
"""


def test_whoever_is_killed_at_any_moment_leaves_whole_blobs(
    open_store: Callable[..., LocalDiskBackend], tmp_path: Path, files: Callable[[], list[Path]]
) -> None:
    draw = random.Random(0)
    reported: dict[bytes, int] = {}
    for life in range(1, KILLS + 1):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "store"), str(life)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout
        lines = [writer.stdout.readline() for _ in range(draw.randrange(1, 40))]
        writer.kill()
        lines += writer.communicate()[0].splitlines()
        for line in lines:
            key, seed = line.split()
            reported[bytes.fromhex(key)] = int(seed)

        store = open_store(CAPACITY_BYTES)
        found = {blob.key: blob for blob in store.scan()}
        assert found.keys() >= reported.keys()
        for key, described in found.items():
            blob = plain(store.get(key))
            assert blob is not None
            meta, data = blob
            assert meta == described.meta
            seed, size = map(int, meta.split())
            assert data == random.Random(seed).randbytes(size)
            assert seed >= reported.get(key, 0)
        assert [path.name for path in files()] == sorted(key.hex() for key in found)
        assert store.usage().entries == len(found)
        store.close()
