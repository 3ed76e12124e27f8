"""Stores that lie in a folder: whose they are, how large, and whether a process uses them.

A store is used as long as a process holds its lock. One that is free may still be wanted: its next
start finds it warm. So the age decides, and whoever runs ``lmcache-kit gc``.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lmcache_kit_disk_backend.blob_directory import LOCK, is_blob_file
from lmcache_kit_disk_backend.owner import NAME, Owner

_STORE = re.compile(r"[0-9a-f]{32}")
_PREFIX = re.compile(r"[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class FoundStore:
    """A store in a folder. ``last_used``: its latest change, in seconds since the epoch. Reads are
    no change. ``nbytes`` is the disk space of its files."""

    path: Path
    owner: Owner | None
    in_use: bool
    files: int
    nbytes: int
    last_used: float

    def older_than(self, seconds: float) -> bool:
        """Whether it has not been used for so long."""
        return time.time() - self.last_used >= seconds


def find(base: Path) -> Iterator[FoundStore]:
    """Yield this user's stores in ``base``, by name. Raises OSError."""
    for path in sorted(base.iterdir()):
        if _STORE.fullmatch(path.name) and _is_store(path):
            with suppress(FileNotFoundError):  # it may go meanwhile
                yield _describe(path)


def remove(store: FoundStore) -> str:
    """Remove a store. Return why it stays, or an empty string.

    Only files that a store makes are removed, and never while a process uses it. Raises OSError.
    """
    with _locked(store.path) as is_free:
        if not is_free:
            return "a process uses it"
        if _last_used(store.path) > store.last_used:
            return "it was used just now"
        for folder in _blob_folders(store.path):
            for entry in _files(folder):
                os.unlink(entry.path)
            with suppress(OSError):  # others' files are in it
                folder.rmdir()
        (store.path / f"{NAME}.tmp").unlink(missing_ok=True)
        if {entry.name for entry in os.scandir(store.path)} - {LOCK, NAME}:
            return "it holds files that are not of a store"
        (store.path / NAME).unlink(missing_ok=True)
        (store.path / LOCK).unlink()
        store.path.rmdir()
        return ""


def _is_store(path: Path) -> bool:
    """Whether it is a folder of this user, with the lock of a store."""
    try:
        folder, lock = os.lstat(path), os.lstat(path / LOCK)
    except OSError:
        return False
    return (
        stat.S_ISDIR(folder.st_mode)
        and stat.S_ISREG(lock.st_mode)
        and folder.st_uid == os.geteuid()
    )


def _describe(path: Path) -> FoundStore:
    with _locked(path) as is_free:
        pass
    sizes = [
        entry.stat(follow_symlinks=False).st_blocks * 512
        for folder in _blob_folders(path)
        for entry in _files(folder)
    ]
    return FoundStore(path, Owner.read(path), not is_free, len(sizes), sum(sizes), _last_used(path))


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a store; yields False when a process has it."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield os.path.samestat(os.stat(path / LOCK), os.fstat(lock))
    finally:
        os.close(lock)


def _last_used(path: Path) -> float:
    names = [path, path / LOCK, path / NAME, *_blob_folders(path)]
    times = []
    for name in names:
        with suppress(FileNotFoundError):
            times.append(os.lstat(name).st_mtime)
    return max(times)


def _blob_folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if _PREFIX.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]


def _files(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if is_blob_file(entry)]
