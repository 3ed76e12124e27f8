"""One process at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lmcache_kit_disk_backend import blob_directory
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from lmcache_kit.errors import BackendError
from tests.support.processes import open_files

KEY = bytes(range(16))
HOLD = """
import sys
from pathlib import Path
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions

store = LocalDiskBackend(DiskOptions(path=Path(sys.argv[1])))
print("open", flush=True)
sys.stdin.read()
"""

OpenStore = Callable[..., LocalDiskBackend]


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=pipe, stdout=pipe, text=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_until_the_first_is_killed(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_directory, "LOCK_WAIT_S", 0.05)
    with holder(tmp_path / "store") as process:
        with pytest.raises(BackendError, match=f"in use by process {process.pid}") as refusal:
            open_store()
        assert str(tmp_path / "store") in str(refusal.value)
        assert "set another path, subfolder or lmcache_instance_id" in refusal.value.hint
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert open_store().usage().entries == 0


def test_a_start_waits_for_a_process_that_is_about_to_be_gone(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_directory, "LOCK_WAIT_S", 60.0)
    first = open_store()
    closing = threading.Timer(0.1, first.close)
    closing.start()
    second = open_store()
    closing.join()
    assert second.usage().entries == 0


def test_a_start_that_is_refused_leaves_no_descriptors(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_directory, "LOCK_WAIT_S", 0.0)
    open_store()
    before = open_files()
    with pytest.raises(BackendError, match="in use"):
        open_store()
    assert open_files() == before


def test_stores_with_different_subfolders_have_one_path(open_store: OpenStore) -> None:
    names = ["", "instance", "../instance", "a/b", "é" * 300]
    stores = [open_store(subfolder=name) for name in names]
    for store, name in zip(stores, names, strict=True):
        store.put(KEY, name.encode(), [])
    for store, name in zip(stores, names, strict=True):
        assert store.get(KEY) == (name.encode(), b"")


def test_the_same_subfolder_is_found_again(open_store: OpenStore) -> None:
    store = open_store(subfolder="one")
    store.put(KEY, b"meta", [])
    store.close()
    assert open_store(subfolder="two").get(KEY) is None
    assert open_store(subfolder="one").get(KEY) == (b"meta", b"")


def test_a_path_that_is_a_file_is_refused(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(BackendError, match=f"cannot use {tmp_path / 'store'}") as refusal:
        open_store()
    assert refusal.value.hint == "A file has that name: set another path"


def test_a_path_inside_a_file_is_refused(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(BackendError, match="Not a directory"):
        open_store(path=tmp_path / "file" / "store")


def test_a_folder_of_another_user_is_refused(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store().close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BackendError, match="is not a folder of this user"):
        open_store()


def test_a_link_in_the_place_of_the_folder_is_refused(
    open_store: OpenStore, tmp_path: Path
) -> None:
    open_store().close()
    [mine] = (tmp_path / "store").iterdir()
    mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="is not a folder of this user"):
        open_store()


def test_a_lock_whose_file_is_removed_while_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two processes would hold the lock of one folder, each on a file of its own."""
    real = fcntl.flock

    def remove_and_lock(lock: int, how: int) -> None:
        monkeypatch.undo()
        (tmp_path / "lock").unlink()
        real(lock, how)

    monkeypatch.setattr(blob_directory.fcntl, "flock", remove_and_lock)
    lock = blob_directory.take_lock(tmp_path, 0.0)
    try:
        assert os.path.samestat(os.fstat(lock), os.stat(tmp_path / "lock"))
        with pytest.raises(BackendError, match="in use"):
            blob_directory.take_lock(tmp_path, 0.0)
    finally:
        os.close(lock)
