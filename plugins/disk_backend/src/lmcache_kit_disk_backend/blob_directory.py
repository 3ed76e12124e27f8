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
        self._numbers = count()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._check_owner()
            self.block_bytes = os.statvfs(self.path).f_frsize
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise backend_error("use", self.path, error) from error
        try:
            self._take_lock()
        except BaseException:
            os.close(self._lock)
            raise

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

    def _take_lock(self) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise self._in_use() from error
                time.sleep(_LOCK_POLL_S)
            except OSError as error:
                raise backend_error("lock", self.path, error) from error
        # Record the holder for the error message of another process.
        with suppress(OSError):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _in_use(self) -> BackendError:
        holder = os.pread(self._lock, 20, 0).decode("ascii", "replace")
        return BackendError(
            f"{self.path} is in use by process {holder or '(unknown)'}",
            hint="Stop that process, or set another path, subfolder or lmcache_instance_id",
        )


def backend_error(action: str, path: Path, error: OSError) -> BackendError:
    """Convert a system's error; ``action`` is a verb such as "read". The hint is the remedy."""
    cause = error.strerror or str(error)
    return BackendError(f"cannot {action} {path}: {cause}", hint=_HINTS.get(error.errno or 0, ""))
