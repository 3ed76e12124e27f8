"""Where the socket lies, and who may use it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lmcache_kit.config import KitConfig
from lmcache_kit.errors import CacheStartFailed
from lmcache_kit.process import paths


def test_the_socket_is_named_by_the_instance(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    one = paths.socket_path(KitConfig(lmcache_instance_id="one"))
    other = paths.socket_path(KitConfig(lmcache_instance_id="../../etc/other"))
    assert one == paths.socket_path(KitConfig(lmcache_instance_id="one")) != other
    assert one.parent == other.parent == folder / "lmcache-kit"


@pytest.mark.parametrize("runtime_dir", [None, "", "relative", "/nonexistent", "/proc/1/root"])
def test_without_a_runtime_directory_of_ours_it_lies_in_tmp(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: str | None
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    if runtime_dir is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert paths.runtime_dir() == Path("/tmp/lmcache-kit-12345")


def test_cache_socket_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert paths.socket_path(KitConfig(cache_socket=Path("x.sock"))) == Path.cwd() / "x.sock"


def test_a_missing_directory_is_made_private(folder: Path) -> None:
    paths.secure_directory(folder / "new")
    assert (folder / "new").stat().st_mode & 0o777 == 0o700


def test_another_users_directory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CacheStartFailed, match=r"belongs to user \d+, and this is user 12345"):
        paths.secure_directory(folder)


def test_a_link_in_the_directorys_place_is_refused(folder: Path) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(CacheStartFailed, match="is not a directory"):
        paths.secure_directory(folder / "link")


def test_a_file_in_the_directorys_place_is_refused(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(CacheStartFailed, match=r"no directory .*cache_socket"):
        paths.secure_directory(folder / "file")


def test_a_file_system_without_locks_is_said_with_the_file_and_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(paths.fcntl, "flock", refuse)
    with pytest.raises(CacheStartFailed, match=r"c\.sock\.lock.*No locks available.*local disk"):
        paths.serving_lock(folder / "c.sock")


def test_a_folder_without_room_for_a_lock_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(paths.os, "open", refuse)
    with pytest.raises(CacheStartFailed, match=r"c\.sock\.start.*No space left.*Free space there"):
        paths.starting_lock(folder / "c.sock")


def test_a_lock_has_one_holder_until_it_is_given_back(folder: Path) -> None:
    path = folder / "c.sock"
    lock = paths.serving_lock(path)
    assert lock is not None
    assert paths.serving_lock(path) is None
    with paths.starting_lock(path) as starting:  # type: ignore[union-attr]
        assert starting is not lock
    lock.close()
    lock.close()
    again = paths.serving_lock(path)
    assert again is not None
    again.close()


def test_a_lock_that_is_given_back_is_free_though_a_forked_child_has_a_copy(folder: Path) -> None:
    path = folder / "c.sock"
    lock = paths.serving_lock(path)
    assert lock is not None
    copy = os.dup(lock.fileno())
    lock.close()
    again = paths.serving_lock(path)
    assert again is not None
    again.close()
    os.close(copy)
