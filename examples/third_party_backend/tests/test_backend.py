"""Tests of this backend alone."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from acme_sqlite.backend import SQLiteBackend
from acme_sqlite.options import SQLiteOptions
from pydantic import ValidationError

from lmcache_kit.errors import BackendError

MIB = 1 << 20
GIB = 1 << 30
KEYS = [bytes([number]) * 16 for number in range(64)]


def options(folder: Path, max_size_bytes: int = 64 * MIB) -> SQLiteOptions:
    return SQLiteOptions(path=folder / "kv.sqlite", max_size_gib=max_size_bytes / GIB)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteBackend]:
    made = SQLiteBackend(options(tmp_path))
    yield made
    made.close()


def put(store: SQLiteBackend, key: bytes, data: bytes) -> bool:
    return store.put(key, b"meta", [memoryview(data)])


def test_all_of_it_is_one_file_for_its_owner_alone(store: SQLiteBackend, tmp_path: Path) -> None:
    put(store, KEYS[0], b"data")
    store.close()
    [file] = tmp_path.iterdir()
    assert file.name == "kv.sqlite"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_second_one_cannot_open_the_file(
    store: SQLiteBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acme_sqlite.backend._WAIT_S", 0.1)
    put(store, KEYS[0], b"data")
    with pytest.raises(BackendError, match=r"kv\.sqlite: database is locked"):
        SQLiteBackend(options(tmp_path))
    assert store.get(KEYS[0])


def test_what_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kv.sqlite").write_bytes(b"a letter to a reader" * 100)
    with pytest.raises(BackendError, match="file is not a database"):
        SQLiteBackend(options(tmp_path))
    assert (tmp_path / "kv.sqlite").read_bytes().startswith(b"a letter")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(BackendError, match=r"taken/kv\.sqlite cannot be opened"):
        SQLiteBackend(options(tmp_path / "taken"))


def test_the_file_stays_within_its_size_and_room_is_used_again(tmp_path: Path) -> None:
    store = SQLiteBackend(options(tmp_path, 4 * MIB))
    fitted = [key for key in KEYS if put(store, key, bytes(300_000))]
    assert 10 <= len(fitted) < len(KEYS)
    store.remove(fitted)
    assert [key for key in KEYS if put(store, key, bytes(300_000))] == fitted
    store.close()
    assert (tmp_path / "kv.sqlite").stat().st_size <= 4 * MIB


def test_the_smallest_limit_is_one(tmp_path: Path) -> None:
    store = SQLiteBackend(options(tmp_path, 1))
    assert not put(store, KEYS[0], bytes(300_000))
    store.close()


def test_a_smaller_limit_than_what_is_there_keeps_it_and_takes_no_more(tmp_path: Path) -> None:
    store = SQLiteBackend(options(tmp_path))
    assert all(put(store, key, bytes(300_000)) for key in KEYS[:20])
    store.close()
    store = SQLiteBackend(options(tmp_path, 1 * MIB))
    usage = store.usage()
    assert usage.entries == 20
    assert usage.capacity_bytes is not None
    assert usage.nbytes <= usage.capacity_bytes
    assert not put(store, KEYS[30], bytes(300_000))
    store.close()


def test_a_scan_has_each_once_though_others_write(store: SQLiteBackend) -> None:
    keys = [number.to_bytes(16, "big") for number in range(600)]
    for key in keys:
        put(store, key, b"old")
    scan = store.scan()
    found = [next(scan).key]
    writer = threading.Thread(target=put, args=(store, keys[0], b"new"))
    writer.start()
    writer.join()
    found += [each.key for each in scan]
    assert found == keys


def test_it_can_be_read_with_sqlite_itself(store: SQLiteBackend, tmp_path: Path) -> None:
    put(store, KEYS[0], b"data")
    store.close()
    db = sqlite3.connect(tmp_path / "kv.sqlite")
    assert db.execute("SELECT key, data FROM blobs").fetchall() == [(KEYS[0], b"data")]
    db.close()


def test_a_path_must_be_absolute() -> None:
    with pytest.raises(ValidationError, match="must be absolute"):
        SQLiteOptions(path=Path("kv.sqlite"))
    assert SQLiteOptions().path.is_absolute()
