"""Files that are not what was written are misses, and go."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lmcache_kit_disk_backend import blob_file
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from plugins.disk_backend.tests.blobs import plain

KEY = bytes(range(16))
OTHER = bytes(16)
META = b"meta" * 2000
DATA = b"data" * 2000

OpenStore = Callable[..., LocalDiskBackend]
Files = Callable[[], list[Path]]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut in the header": lambda whole: whole[:20],
    "cut in meta": lambda whole: whole[:5000],
    "cut before data": lambda whole: whole[:12288],
    "cut by one byte": lambda whole: whole[:-1],
    "one byte more": lambda whole: whole + b"x",
    "zeros": lambda whole: bytes(len(whole)),
    "foreign": lambda whole: b"#!/bin/sh\n".ljust(len(whole)),
    "another version": lambda whole: flipped(whole, 4),
    "a flipped bit in meta": lambda whole: flipped(whole, 3000),
    "a flipped bit in meta's last byte": lambda whole: flipped(whole, 48 + len(META) - 1),
}
HEADER_BYTES = 48


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("how", ["get", "scan"])
def test_a_damaged_file_is_a_miss_and_goes(
    open_store: OpenStore,
    files: Files,
    how: str,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = open_store()
    store.put(KEY, META, [memoryview(DATA)])
    store.close()
    [file] = files()
    file.write_bytes(damage(file.read_bytes()))

    store = open_store()
    assert store.usage().entries == 1
    for _ in range(2):
        assert store.get(KEY) is None if how == "get" else list(store.scan()) == []
    assert files() == []
    assert (store.usage().entries, store.usage().nbytes) == (0, 0)
    assert store.contains([KEY]) == [False]
    assert [KEY.hex() in record.getMessage() for record in caplog.records] == [True]
    assert store.put(KEY, META, [memoryview(DATA)])
    assert store.get(KEY) is not None


@pytest.mark.parametrize("how", ["get", "scan"])
def test_a_flipped_bit_in_any_byte_of_the_header_is_a_miss(
    open_store: OpenStore, files: Files, how: str
) -> None:
    for at in range(HEADER_BYTES):
        store = open_store()
        store.put(KEY, META, [memoryview(DATA)])
        store.close()
        [file] = files()
        file.write_bytes(flipped(file.read_bytes(), at))
        store = open_store()
        assert store.get(KEY) is None if how == "get" else list(store.scan()) == [], at
        assert files() == [], at
        assert (store.usage().entries, store.usage().nbytes) == (0, 0)
        store.close()


@pytest.mark.parametrize(("field", "value"), [("VERSION", 2), ("MAGIC", b"LKDc")])
def test_a_whole_file_of_another_format_is_a_miss(
    store: LocalDiskBackend,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(blob_file, field, value)
        store.put(KEY, META, [memoryview(DATA)])
        assert store.get(KEY) == (META, DATA)
    assert store.get(KEY) is None
    assert files() == []


def test_the_blob_of_another_key_is_a_miss(store: LocalDiskBackend, files: Files) -> None:
    store.put(KEY, META, [memoryview(DATA)])
    store.put(OTHER, META, [memoryview(DATA)])
    other, file = files()
    file.write_bytes(other.read_bytes())
    assert store.get(KEY) is None
    assert store.get(OTHER) is not None
    assert files() == [other]


def test_a_file_that_was_taken_away_is_a_miss_and_takes_no_room(
    store: LocalDiskBackend, files: Files
) -> None:
    store.put(KEY, META, [memoryview(DATA)])
    [file] = files()
    file.unlink()
    assert store.get(KEY) is None
    assert store.usage().nbytes == 0


def test_a_whole_blob_that_took_the_place_of_a_damaged_one_stays(
    store: LocalDiskBackend, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, META, [memoryview(DATA)])
    [file] = files()
    file.write_bytes(b"damaged")
    real = os.pread

    def pread_and_put(fd: int, nbytes: int, offset: int) -> bytes:
        monkeypatch.undo()
        found = real(fd, nbytes, offset)
        store.put(KEY, b"new", [memoryview(b"whole")])
        return found

    monkeypatch.setattr(os, "pread", pread_and_put)
    assert store.get(KEY) is None
    assert store.get(KEY) == (b"new", b"whole")


def test_a_file_that_is_cut_after_it_was_opened_ends_early_and_is_a_miss_then(
    store: LocalDiskBackend, files: Files
) -> None:
    store.put(KEY, META, [memoryview(bytes(2 << 20))])
    blob = store.get(KEY)
    [file] = files()
    os.truncate(file, file.stat().st_size - 1000)
    assert plain(blob) == (META, bytes((2 << 20) - 1000))
    assert store.get(KEY) is None
    assert files() == []


def test_a_damaged_file_that_cannot_be_removed_is_a_miss(
    store: LocalDiskBackend, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    store.put(KEY, META, [memoryview(DATA)])
    [file] = files()
    file.write_bytes(b"damaged")
    taken = store.usage()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert store.get(KEY) is None
    assert store.usage() == taken


def test_links_and_names_of_others_are_left_alone(
    open_store: OpenStore, tmp_path: Path, files: Files
) -> None:
    store = open_store()
    store.put(KEY, META, [memoryview(DATA)])
    store.put(OTHER, b"", [])
    store.close()
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    other, file = files()
    other.unlink()
    other.symlink_to(precious)
    theirs = [
        file.with_name("notes.txt"),
        file.with_name(KEY.hex().upper()),
        file.with_name(KEY.hex() + ".bak"),
        file.with_name(KEY.hex() + ".tmp"),
        file.with_name("ff" * 16),
        file.parents[1] / "README",
    ]
    for path in theirs:
        path.write_bytes(b"theirs")
    (tmp_path / ("ff" * 16)).write_bytes(b"theirs")
    (file.parents[1] / "ff").symlink_to(tmp_path)
    (file.parent / ("00" * 15 + "ff")).mkdir()

    store = open_store()
    assert store.usage().entries == 1
    assert [found.key for found in store.scan()] == [KEY]
    assert store.get(OTHER) is None
    assert other.is_symlink()
    assert precious.read_bytes() == b"precious"
    assert all(path.read_bytes() == b"theirs" for path in theirs)


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_what_takes_a_files_name_meanwhile_is_a_miss_and_stays(
    store: LocalDiskBackend, files: Files, tmp_path: Path, what: str
) -> None:
    store.put(KEY, META, [memoryview(DATA)])
    [file] = files()
    if what == "link":
        file.symlink_to(file.rename(tmp_path / "whole"))
    elif what == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.unlink()
        os.mkfifo(file)
    assert store.get(KEY) is None
    assert os.path.lexists(file)
    assert store.usage().entries == 0


def test_what_a_writer_that_died_has_left_is_removed_at_start(
    open_store: OpenStore, files: Files
) -> None:
    store = open_store()
    store.put(KEY, META, [memoryview(DATA)])
    store.close()
    [file] = files()
    for number in (0, 17):
        file.with_name(f"{KEY.hex()}.{number}.tmp").write_bytes(b"half a blob")
    store = open_store()
    assert files() == [file]
    assert store.usage().entries == 1


def test_a_start_does_not_read_what_lies_there(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    store.put(KEY, META, [memoryview(DATA)])
    store.close()

    def refuse(fd: int, nbytes: int, offset: int) -> bytes:
        raise AssertionError("it read")

    monkeypatch.setattr(os, "pread", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_store().contains([KEY]) == [True]
    assert caplog.records == []
