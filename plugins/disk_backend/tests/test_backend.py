from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from lmcache_kit.errors import BackendError
from lmcache_kit.interfaces.backend import MAX_META_BYTES
from plugins.disk_backend.tests.blobs import plain
from tests.support.processes import open_files

KEY = bytes(range(16))
OTHER = bytes(16)

OpenStore = Callable[..., LocalDiskBackend]


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def read(store: LocalDiskBackend, key: bytes) -> tuple[bytes, bytes] | None:
    return plain(store.get(key))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 20, (3 << 20) + 7])
@pytest.mark.parametrize("meta", [b"", b"m", b"x" * 4096, b"y" * MAX_META_BYTES], ids=len)
def test_what_was_put_is_got(store: LocalDiskBackend, meta: bytes, size: int) -> None:
    data = os.urandom(size)
    assert store.put(KEY, meta, views(data))
    assert read(store, KEY) == (meta, data)


def test_pieces_are_joined_however_many_there_are(store: LocalDiskBackend) -> None:
    pieces = [os.urandom(number % 7) for number in range(3000)]
    assert store.put(KEY, b"", views(*pieces))
    assert read(store, KEY) == (b"", b"".join(pieces))


def test_pieces_may_have_other_shapes_than_bytes(store: LocalDiskBackend) -> None:
    grid = memoryview(bytes(range(24))).cast("I", (2, 3))
    assert store.put(KEY, b"", [grid])
    assert read(store, KEY) == (b"", bytes(range(24)))


def test_a_system_that_writes_a_little_at_a_time_writes_all(
    store: LocalDiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(fd: int, parts: Sequence[memoryview]) -> int:
        return os.write(fd, parts[0][:1000])

    monkeypatch.setattr(os, "writev", short)
    data = os.urandom(10_000)
    assert store.put(KEY, b"meta", views(data[:1500], data[1500:]))
    assert read(store, KEY) == (b"meta", data)


def test_meta_over_the_limit_is_refused(store: LocalDiskBackend) -> None:
    with pytest.raises(ValueError, match="at most 1048576"):
        store.put(KEY, bytes(MAX_META_BYTES + 1), [])
    assert store.usage().entries == 0


@pytest.mark.parametrize("size", [100, 2 << 20], ids=["read", "opened"])
def test_who_has_a_blob_keeps_it_when_it_is_replaced_or_removed(
    store: LocalDiskBackend, size: int
) -> None:
    first, second = os.urandom(size), os.urandom(size)
    store.put(KEY, b"1", views(first))
    held = [store.get(KEY)]
    store.put(KEY, b"2", views(second))
    held.append(store.get(KEY))
    store.remove([KEY])
    store.close()
    assert [plain(blob) for blob in held] == [(b"1", first), (b"2", second)]


def test_data_begins_at_a_multiple_of_4096_bytes(
    store: LocalDiskBackend, files: Callable[[], list[Path]]
) -> None:
    store.put(KEY, b"m" * 5000, views(b"data"))
    [file] = files()
    assert file.read_bytes()[8192:] == b"data"


def test_a_blob_is_a_file_named_by_its_key(
    store: LocalDiskBackend, files: Callable[[], list[Path]]
) -> None:
    store.put(KEY, b"", views(b"data"))
    [file] = files()
    assert (file.parent.name, file.name) == ("00", KEY.hex())


def test_nobody_else_may_read(store: LocalDiskBackend, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store.put(KEY, b"", views(b"data"))
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_blobs_outlive_the_store_in_the_order_in_which_they_were_put(
    open_store: OpenStore,
) -> None:
    store = open_store()
    keys = [bytes([number]) * 16 for number in (9, 3, 200, 7, 1)]
    for key in keys:
        store.put(key, key[:1], views(key))
    store.put(keys[1], b"again", views(b"longer than before"))
    expected = [keys[0], *keys[2:], keys[1]]
    assert [found.key for found in store.scan()] == expected
    usage = store.usage()
    store.close()

    again = open_store()
    assert [found.key for found in again.scan()] == expected
    assert again.usage() == usage
    assert read(again, keys[1]) == (b"again", b"longer than before")


def test_the_order_holds_when_the_clock_is_set_back(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [bytes([number]) * 16 for number in (5, 4, 3, 2)]
    for hours, key in enumerate(keys):
        now = 1_700_000_000_000_000_000 - hours * 3_600_000_000_000
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        store = open_store()
        store.put(key, b"", [])
        store.close()
    assert [found.key for found in open_store().scan()] == keys


def test_scan_gives_meta_and_size(store: LocalDiskBackend) -> None:
    store.put(KEY, b"meta", views(b"da", b"ta"))
    assert list(store.scan()) == [(KEY, b"meta", 4)]


def test_scan_passes_over_what_is_removed_meanwhile(store: LocalDiskBackend) -> None:
    store.put(KEY, b"", [])
    store.put(OTHER, b"", [])
    scan = store.scan()
    assert next(scan).key == KEY
    store.remove([OTHER])
    assert list(scan) == []


def test_contains_answers_in_order(store: LocalDiskBackend) -> None:
    store.put(KEY, b"", [])
    assert store.contains([OTHER, KEY, OTHER]) == [False, True, False]
    assert store.contains([]) == []


def test_what_is_not_there_is_a_miss_and_is_passed_over(store: LocalDiskBackend) -> None:
    store.put(KEY, b"", [])
    assert store.get(OTHER) is None
    store.remove([OTHER, KEY, KEY])
    assert store.get(KEY) is None
    assert store.usage().nbytes == 0


def test_a_closed_store_refuses_everything(store: LocalDiskBackend) -> None:
    store.put(KEY, b"", [])
    scan = store.scan()
    store.close()
    store.close()
    for call in (
        lambda: store.put(KEY, b"", []),
        lambda: store.get(KEY),
        lambda: store.contains([KEY]),
        lambda: store.remove([KEY]),
        store.scan,
        store.usage,
        lambda: next(scan),
    ):
        with pytest.raises(BackendError, match="is closed"):
            call()


def test_no_descriptors_are_left(open_store: OpenStore) -> None:
    before = open_files()
    store = open_store()
    for _ in range(3):
        store.put(KEY, b"m", views(bytes(2 << 20)))
        assert read(store, KEY)
        assert len(list(store.scan())) == 1
    scan = store.scan()
    next(scan)
    store.close()
    assert open_files() == before
