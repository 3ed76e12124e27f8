"""Many threads at once."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from lmcache_kit.errors import BackendError
from plugins.disk_backend.tests.blobs import plain
from tests.support.processes import open_files

KEYS = [bytes([number]) * 16 for number in range(6)]
THREADS = 6
ROUNDS = 150

OpenStore = Callable[..., LocalDiskBackend]


def write(store: LocalDiskBackend, key: bytes, draw: random.Random) -> bool:
    """A blob that says what it must be: its bytes are one number, as is its meta."""
    number = draw.randbytes(1)
    size = draw.choice([0, 1, 5000, 1_100_000])
    return store.put(key, key + number, [memoryview(number * size)])


def check(key: bytes, meta: bytes, data: Any) -> None:
    data = bytes(data)
    assert meta[:16] == key
    assert data == meta[16:] * len(data)
    assert len(data) in (0, 1, 5000, 1_100_000)


def test_readers_get_whole_blobs_whatever_happens_to_them(
    open_store: OpenStore, files: Callable[[], list[Path]]
) -> None:
    store = open_store(5 << 20)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(ROUNDS):
            key = draw.choice(KEYS)
            match draw.randrange(8):
                case 0 | 1 | 2:
                    write(store, key, draw)
                case 3 | 4 | 5:
                    if blob := plain(store.get(key)):
                        check(key, *blob)
                case 6:
                    store.remove([key])
                case _:
                    seen = [found.key for found in store.scan()]
                    assert len(seen) == len(set(seen))
            assert store.usage().nbytes <= 5 << 20

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, seed) for seed in range(THREADS)]:
            done.result()
    usage, paths = store.usage(), files()
    assert usage.entries == len(paths)
    assert usage.nbytes == sum(-(-path.stat().st_size // 4096) * 4096 for path in paths)
    order = [found.key for found in store.scan()]
    store.close()
    again = open_store(5 << 20)
    assert [found.key for found in again.scan()] == order
    assert again.usage() == usage


def test_closing_while_busy_ends_everything(open_store: OpenStore) -> None:
    before = open_files()
    store = open_store()
    busy = threading.Barrier(THREADS + 1)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        calls: list[Callable[[bytes], Any]] = [
            lambda key: write(store, key, draw),
            lambda key: plain(store.get(key)),
            lambda key: store.remove([key]),
            lambda key: list(store.scan()),
        ]
        busy.wait()
        while True:
            draw.choice(calls)(draw.choice(KEYS))

    with ThreadPoolExecutor(THREADS) as pool:
        done = [pool.submit(work, seed) for seed in range(THREADS)]
        busy.wait()
        write(store, KEYS[0], random.Random(0))
        store.close()
        for each in done:
            with pytest.raises(BackendError, match="is closed"):
                each.result(timeout=30)
        del done, each
    assert open_files() == before
    again = open_store()
    for found in again.scan():
        blob = plain(again.get(found.key))
        assert blob
        check(found.key, *blob)


def test_closing_waits_for_what_is_being_written(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = open_store(), os.writev
    writing, go_on = threading.Event(), threading.Event()

    def wait_and_write(fd: int, parts: Sequence[Any]) -> int:
        writing.set()
        assert go_on.wait(30)
        return real(fd, parts)

    monkeypatch.setattr(os, "writev", wait_and_write)
    with ThreadPoolExecutor(2) as pool:
        put = pool.submit(store.put, KEYS[0], b"meta", [memoryview(b"data")])
        assert writing.wait(30)
        closed = pool.submit(store.close)
        while not refuses(store):
            pass
        assert not closed.done()
        go_on.set()
        assert put.result(30) is True
        closed.result(30)
    assert open_store().get(KEYS[0]) == (b"meta", b"data")


def refuses(store: LocalDiskBackend) -> bool:
    try:
        store.usage()
    except BackendError:
        return True
    return False
