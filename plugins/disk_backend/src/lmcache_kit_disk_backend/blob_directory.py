"""The directory of one backend: its lock, and the names of the files in it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from lmcache_kit.errors import BackendError
from lmcache_kit_disk_backend.owner import Owner

LOCK = "lock"
LOCK_WAIT_S = 2.0
"""How long to wait for the lock of a process that was just killed."""
_LOCK_POLL_S = 0.02
_KEY = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.[0-9]+\.tmp")
_HINTS = {
    errno.ENOSPC: "Free space there, or set a smaller max_size_gib",
    errno.EDQUOT: "Raise the quota, or set a smaller max_size_gib",
    errno.EROFS: "Mount it for writing, or set another path",
    errno.EACCES: "Let this user write there, or set another path",
    errno.EEXIST: "A file has that name: set another path",
    errno.ENOTDIR: "A file has that name: set another path",
    errno.ENOENT: "There is no such folder, and none can be made there: set another path",
    errno.EPERM: "Let this user write there, or set another path",
    errno.ENOLCK: "Its file system has no locks: set a path on a local disk",
    errno.EIO: "The disk may be failing: see the kernel's log",
}


class BlobFileInfo(NamedTuple):
    """Modification time, key and size of a file that is named like a blob."""

    written_ns: int
    key: bytes
    nbytes: int


class BlobDirectory:
    """Exclusive directory of files that are named by keys, in up to 256 folders.

    ``path`` is created when it is missing, and in it a folder named by a digest of ``subfolder``.
    Raises BackendError when the folder cannot be created, belongs to another user, or is in use.
    """

    def __init__(self, path: Path, subfolder: str) -> None:
        self.path = path / hashlib.sha256(subfolder.encode()).hexdigest()[:32]
        self._subfolder = subfolder
        self._numbers = count()
        self._open(wait_s=LOCK_WAIT_S)

    def is_intact(self) -> bool:
        """Whether the folder is still the one that was locked; not after ``rm -rf`` or a mount."""
        try:
            return os.path.samestat(os.stat(self.path / LOCK), os.fstat(self._lock))
        except OSError:
            return False

    def reopen(self) -> None:
        """Create the folder again, or take over what lies in its place. Raises BackendError."""
        gone = self._lock
        self._open(wait_s=0.0)
        os.close(gone)

    def _open(self, wait_s: float) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._check_owner()
            self.block_bytes = os.statvfs(self.path).f_frsize
        except OSError as error:
            raise backend_error("use", self.path, error) from error
        self._lock = take_lock(self.path, wait_s)
        Owner.of_this_process(self._subfolder).write(self.path)

    def file(self, key: bytes) -> Path:
        name = key.hex()
        return self.path / name[:2] / name

    def temporary(self, key: bytes) -> Path:
        """Return a unique name beside the file of the key."""
        return self.file(key).with_suffix(f".{next(self._numbers)}.tmp")

    def recover(self) -> list[BlobFileInfo]:
        """List all blobs, the oldest first, and remove unfinished files. Raises BackendError."""
        found: list[BlobFileInfo] = []
        try:
            for entry in self._entries():
                if _TEMPORARY.fullmatch(entry.name):
                    os.unlink(entry.path)
                elif _KEY.fullmatch(entry.name):
                    seen = entry.stat(follow_symlinks=False)
                    found.append(
                        BlobFileInfo(seen.st_mtime_ns, bytes.fromhex(entry.name), seen.st_size)
                    )
        except OSError as error:
            raise backend_error("read", self.path, error) from error
        return sorted(found)

    def close(self) -> None:
        os.close(self._lock)

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """Yield the regular files that lie in the folder of their name."""
        for number in range(256):
            prefix = f"{number:02x}"
            folder = self.path / prefix
            if folder.is_symlink() or not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(prefix) and entry.is_file(follow_symlinks=False):
                        yield entry

    def _check_owner(self) -> None:
        """Raise BackendError unless this user owns the folder: a writer here can forge KV."""
        seen = os.lstat(self.path)
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
            raise BackendError(
                f"{self.path} is not a folder of this user",
                hint="Remove it, or set another path or subfolder",
            )


def is_blob_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is the file of a blob, complete or not, in the folder of its name."""
    named = _KEY.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)
    prefix = os.path.basename(os.path.dirname(entry.path))
    return bool(named) and entry.name.startswith(prefix) and entry.is_file(follow_symlinks=False)


def take_lock(folder: Path, wait_s: float) -> int:
    """Lock the folder of a store, and return the descriptor that holds the lock.

    Raises BackendError that names the holder when it is not free within ``wait_s`` seconds.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise backend_error("use", folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file.
            if os.path.samestat(os.stat(folder / LOCK), os.fstat(lock)):
                break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                refusal = _in_use(folder, lock)
                os.close(lock)
                raise refusal from error
            time.sleep(_LOCK_POLL_S)
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(lock)
            raise backend_error("lock", folder, error) from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    # Record the holder for the error message of another process.
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _in_use(folder: Path, lock: int) -> BackendError:
    holder = os.pread(lock, 20, 0).decode("ascii", "replace")
    return BackendError(
        f"{folder} is in use by process {holder or '(unknown)'}",
        hint="Stop that process, or set another path, subfolder or lmcache_instance_id",
    )


def backend_error(action: str, path: Path, error: OSError) -> BackendError:
    """Convert a system's error; ``action`` is a verb such as "read". The hint is the remedy."""
    cause = error.strerror or str(error)
    return BackendError(f"cannot {action} {path}: {cause}", hint=_HINTS.get(error.errno or 0, ""))
