"""A folder that is removed or replaced under a running process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lmcache_kit_disk_backend import blob_directory
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import StoreUsage
from plugins.disk_backend.tests.blobs import plain
from tests.cache.conftest import FakeMemory
from tests.cache.stores import Cache
from tests.support.clocks import FakeClock
from tests.support.waiting import eventually

KEYS = [bytes([number]) * 16 for number in range(4)]
DATA = b"data" * 2000

OpenStore = Callable[..., LocalDiskBackend]
Files = Callable[[], list[Path]]


def put(store: LocalDiskBackend, key: bytes) -> bool:
    return store.put(key, b"meta", [memoryview(DATA)])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(params=["all", "inside", "one store"])
def removed(request: pytest.FixtureRequest, base: Path) -> Callable[[], None]:
    """Remove the folder, or what lies in it."""

    def remove() -> None:
        for path in [base] if request.param == "all" else list(base.iterdir()):
            shutil.rmtree(path)
        if request.param == "inside":
            (base / "notes").write_text("mine")

    return remove


def test_a_put_makes_a_removed_folder_again(
    store: LocalDiskBackend, files: Files, removed: Callable[[], None]
) -> None:
    for key in KEYS[:3]:
        put(store, key)
    removed()
    assert put(store, KEYS[3])
    assert plain(store.get(KEYS[3])) == (b"meta", DATA)
    assert store.contains(KEYS) == [False, False, False, True]
    assert store.usage().entries == 1
    assert [path.name for path in files() if path.name != "notes"] == [KEYS[3].hex()]


def test_nothing_is_left_of_the_room_that_removed_files_took(
    store: LocalDiskBackend, removed: Callable[[], None]
) -> None:
    capacity = store.usage().capacity_bytes
    for key in KEYS:
        put(store, key)
    removed()
    assert store.usage() == StoreUsage(0, 0, capacity)


def test_a_get_from_a_removed_folder_is_a_miss_and_one_warning(
    store: LocalDiskBackend, removed: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    for key in KEYS:
        put(store, key)
    removed()
    with caplog.at_level(logging.WARNING):
        assert [store.get(key) for key in KEYS] == [None] * 4
        store.remove(KEYS)
        assert list(store.scan()) == []
    [warning] = caplog.records
    assert "was removed or replaced: 4 blobs are gone" in warning.getMessage()
    assert store.damaged_blobs() == 0


def test_the_lock_is_held_again(
    store: LocalDiskBackend,
    open_store: OpenStore,
    removed: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blob_directory, "LOCK_WAIT_S", 0.0)
    removed()
    put(store, KEYS[0])
    with pytest.raises(BackendError, match=f"in use by process {os.getpid()}"):
        open_store()


def test_what_another_process_has_begun_in_its_place_is_left_alone(
    open_store: OpenStore, base: Path, files: Files
) -> None:
    first = open_store()
    put(first, KEYS[0])
    shutil.rmtree(base)
    second = open_store()
    put(second, KEYS[0])
    there = files()
    for call in (lambda: put(first, KEYS[1]), lambda: first.remove([KEYS[0]]), first.usage):
        with pytest.raises(BackendError, match="in use by process"):
            call()
    assert files() == there
    second.close()
    assert put(first, KEYS[1])
    assert first.contains(KEYS[:2]) == [True, True]


def test_what_was_put_back_in_its_place_is_found(
    store: LocalDiskBackend, base: Path, tmp_path: Path
) -> None:
    put(store, KEYS[0])
    shutil.copytree(base, tmp_path / "copy")
    put(store, KEYS[1])
    shutil.rmtree(base)
    (tmp_path / "copy").rename(base)
    assert put(store, KEYS[2])
    assert store.contains(KEYS) == [True, False, True, False]
    assert plain(store.get(KEYS[0])) == (b"meta", DATA)


def test_a_folder_that_cannot_be_made_again_is_an_error_until_it_can(
    store: LocalDiskBackend, base: Path
) -> None:
    put(store, KEYS[0])
    shutil.rmtree(base)
    base.write_text("a file")
    with pytest.raises(BackendError, match="A file has that name"):
        put(store, KEYS[0])
    base.unlink()
    assert put(store, KEYS[0])


def test_healing_keeps_no_descriptors(store: LocalDiskBackend, base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        shutil.rmtree(base)
        put(store, KEYS[0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_says_whose_it_is(open_store: OpenStore, base: Path) -> None:
    open_store(subfolder="gpu-1").close()
    [folder] = base.iterdir()
    said = json.loads((folder / "owner.json").read_text())
    assert (said["subfolder"], said["host"], said["pid"]) == (
        "gpu-1",
        socket.gethostname(),
        os.getpid(),
    )
    assert "lmcache-kit gc" in said["about"]
    assert (folder / "owner.json").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def tiered(open_store: OpenStore) -> Iterator[tuple[Cache, FakeClock]]:
    """A cache whose only tier below memory is the store."""
    clock = FakeClock()

    def make_engine(capacity_bytes: int) -> CacheEngine:
        return CacheEngine(FakeMemory(capacity_bytes), LRU(), location="Fake", clock=clock)

    cache = Cache(make_engine, open_store(), clock=clock)  # type: ignore[arg-type]
    yield cache, clock
    cache.close()
    cache.engine.close()


def test_a_tier_whose_folder_was_removed_heals_without_a_restart(
    tiered: tuple[Cache, FakeClock], base: Path
) -> None:
    cache, clock = tiered
    cache.store(range(12))
    shutil.rmtree(base)
    clock.now += 60
    cache.engine.expire()
    cache.settle()
    assert cache.stat("chunks", "A") == 0
    cache.forget_memory()
    assert cache.hit(range(12)) == 0
    cache.store(range(12))
    cache.forget_memory()
    assert cache.hit(range(12)) == 12
    assert cache.stat("failures_total", "A") == 0


def test_a_write_to_a_removed_folder_arrives(tiered: tuple[Cache, FakeClock], base: Path) -> None:
    cache, _ = tiered
    cache.store(range(4))
    shutil.rmtree(base)
    cache.store(range(100, 104))
    cache.forget_memory()
    assert cache.hit(range(100, 104)) == 4
    assert cache.hit(range(4)) == 0


def test_a_damaged_file_counts_as_corrupt(tiered: tuple[Cache, FakeClock], files: Files) -> None:
    cache, _ = tiered
    cache.store(range(12))
    cache.forget_memory()
    for file in files():
        file.write_bytes(file.read_bytes()[:-1])
    assert cache.hit(range(12)) == 0
    cache.settle()
    assert cache.stat("corrupt_total", "A") >= 1
    # Chunks behind the first may still be read: each is counted, and then removed.
    eventually(lambda: cache.stat("corrupt_total", "A") == 3 - len(files()))
