"""What may lie there, and what happens when the disk takes no more."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces import StoreUsage

KEYS = [bytes([number]) * 16 for number in range(64)]
BLOCK = 4096
BLOB = 4 * BLOCK
"""The room of a blob of ``SIZE`` bytes."""
SIZE = 3 * BLOCK

OpenStore = Callable[..., LocalDiskBackend]
Files = Callable[[], list[Path]]


def put(store: LocalDiskBackend, key: bytes, size: int = SIZE) -> bool:
    return store.put(key, b"meta", [memoryview(key[:1] * size)])


def room(paths: list[Path]) -> int:
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in paths)


def test_what_does_not_fit_is_not_put_and_changes_nothing(
    open_store: OpenStore, files: Files
) -> None:
    store = open_store(2 * BLOB)
    assert put(store, KEYS[0])
    assert put(store, KEYS[1])
    before = files()
    for key in KEYS[:3]:
        assert not put(store, key, 1)
    assert files() == before
    assert store.usage() == StoreUsage(2, 2 * BLOB, 2 * BLOB)
    assert store.get(KEYS[0]) == (b"meta", KEYS[0][:1] * SIZE)
    store.remove([KEYS[0]])
    assert put(store, KEYS[2])


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 5 * BLOCK - 1])
def test_the_room_of_a_blob_is_that_of_its_file(
    store: LocalDiskBackend, files: Files, size: int
) -> None:
    assert put(store, KEYS[0], size)
    assert store.usage().nbytes == room(files())


def test_a_blob_that_is_replaced_gives_its_room_back(open_store: OpenStore, files: Files) -> None:
    store = open_store(3 * BLOB)
    for size in (SIZE, SIZE, 1, 2 * SIZE, SIZE):
        assert put(store, KEYS[0], size)
        assert store.usage() == StoreUsage(1, room(files()), 3 * BLOB)


def test_a_store_that_may_hold_less_than_before_forgets_the_oldest(
    open_store: OpenStore, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(4 * BLOB)
    for key in (3, 1, 2, 0):
        put(store, KEYS[key])
    store.close()
    store = open_store(2 * BLOB + BLOCK)
    assert [found.key for found in store.scan()] == [KEYS[2], KEYS[0]]
    assert store.usage().nbytes == room(files()) == 2 * BLOB
    assert "removed the oldest 2 of 4 blobs" in caplog.text


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written until it is set."""
    opened, real = threading.Event(), os.writev

    def wait_and_write(fd: int, parts: Sequence[Any]) -> int:
        assert opened.wait(30)
        return real(fd, parts)

    monkeypatch.setattr(os, "writev", wait_and_write)
    yield opened
    opened.set()


def test_room_is_taken_before_anything_is_written(
    open_store: OpenStore, files: Files, gate: threading.Event
) -> None:
    store = open_store(3 * BLOB)
    results: list[bool] = []
    refused = threading.Semaphore(0)

    def try_to(key: bytes) -> None:
        results.append(put(store, key))
        refused.release()

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(try_to, key) for key in KEYS[:8]]
        for _ in range(5):
            assert refused.acquire(timeout=30)
        assert results == [False] * 5
        assert store.usage() == StoreUsage(0, 3 * BLOB, 3 * BLOB)
        gate.set()
        for each in done:
            each.result()
    assert results == [False] * 5 + [True] * 3
    assert store.usage() == StoreUsage(3, room(files()), 3 * BLOB)


def failing(code: int) -> Callable[..., int]:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def failing_half_way(code: int) -> Callable[..., int]:
    def fail(fd: int, parts: Sequence[memoryview]) -> int:
        if parts[0][:1] == b"L":  # the header; what comes after it fails
            return os.write(fd, parts[0])
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(
    ("call", "fail"),
    [("writev", failing), ("writev", failing_half_way), ("utime", failing), ("open", failing)],
    ids=["write", "write half way", "utime", "open"],
)
def test_a_disk_that_fails_leaves_what_was_there(
    store: LocalDiskBackend,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fail: Callable[[int], Any],
    code: int,
) -> None:
    put(store, KEYS[1])
    before, usage = files(), store.usage()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail(code))
        for key in KEYS[:2]:
            with pytest.raises(BackendError, match=os.strerror(code)) as refusal:
                put(store, key, 2 * SIZE)
            assert str(before[0].parents[1]) in str(refusal.value)
            assert refusal.value.hint
    assert files() == before
    assert store.usage() == usage
    assert store.get(KEYS[1]) == (b"meta", KEYS[1][:1] * SIZE)
    assert put(store, KEYS[0])


def test_a_rest_that_cannot_be_removed_takes_room_until_a_restart(
    open_store: OpenStore, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", failing(errno.EIO))
        patch.setattr(Path, "unlink", failing(errno.EIO))
        with pytest.raises(BackendError, match="cannot write"):
            put(store, KEYS[0])
    assert store.usage() == StoreUsage(0, BLOB, 64 << 20)
    store.close()
    assert open_store().usage() == StoreUsage(0, 0, 64 << 20)
    assert files() == []


@pytest.mark.parametrize("call", ["pread", "open"])
def test_a_disk_that_cannot_be_read_is_an_error_and_not_a_miss(
    store: LocalDiskBackend, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    put(store, KEYS[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO))
        with pytest.raises(BackendError, match=r"cannot read .*Input/output error"):
            store.get(KEYS[0])
        with pytest.raises(BackendError, match=r"cannot read .*Input/output error"):
            list(store.scan())
    assert store.get(KEYS[0]) is not None


def test_a_folder_that_cannot_be_changed_is_an_error(
    store: LocalDiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, KEYS[0])
    usage = store.usage()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(errno.EROFS))
        with pytest.raises(BackendError, match=r"cannot remove .*Read-only file system"):
            store.remove([KEYS[0]])
    assert store.usage() == usage


def test_a_real_limit_on_files_is_an_error(store: LocalDiskBackend, files: Files) -> None:
    put(store, KEYS[1])
    before, limits = files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(BackendError, match="File too large"):
            put(store, KEYS[0], 2 << 20)
        with pytest.raises(BackendError, match="File too large"):
            put(store, KEYS[1], 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files() == before
    assert store.get(KEYS[1]) == (b"meta", KEYS[1][:1] * SIZE)
    assert put(store, KEYS[0], 2 << 20)


FILL = """
import os, sys
from pathlib import Path
from lmcache_kit.errors import BackendError
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions

path = Path(sys.argv[1])
store = LocalDiskBackend(DiskOptions(path=path, max_size_gib=1))
data = os.urandom(100_000)

def put(key):
    return store.put(key, b"meta", [memoryview(data)])

kept = []
try:
    for number in range(100):
        assert put(bytes([number]) * 16)
        kept.append(bytes([number]) * 16)
    raise SystemExit("the disk was never full")
except BackendError as error:
    print(error)
assert kept
for key in (b"new" + bytes(13), kept[0]):
    try:
        put(key)
        raise SystemExit("there was room for one more")
    except BackendError:
        pass
others = ("lock", "owner.json")
files = [each for each in path.rglob("*") if each.is_file() and each.name not in others]
assert sorted(each.name for each in files) == sorted(key.hex() for key in kept)
assert sum(each.stat().st_blocks * 512 for each in files) == store.usage().nbytes
assert all(store.get(key) == (b"meta", data) for key in kept)
store.remove(kept[:2])
assert put(kept[0])
"""


def test_a_real_disk_that_is_full_is_an_error_and_can_be_used_again(tmp_path: Path) -> None:
    """On a tmpfs of 1 MiB, mounted where only the process that fills it sees it."""
    mount = 'mount -t tmpfs -o size=1m none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    if not shutil.which("unshare"):
        pytest.skip("unshare(1) is missing, which is needed to mount a small tmpfs")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh",
         str(tmp_path), sys.executable, FILL],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert f"cannot write {tmp_path}" in done.stdout
    assert "No space left on device. Free space there, or set a smaller" in done.stdout
