"""The path where a cache process listens, and the locks that keep it the only one there.

Beside the socket ``X`` lie ``X.lock``, ``X.start`` and, for a spawned process, ``X.log``. The
holder of the flock on ``X.lock`` serves at ``X`` and may replace it. The holder of the one on
``X.start`` may start a process that does. These files are never removed: a removed lock file locks
nothing, and the kernel releases a flock however its holder dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Self

from blake3 import blake3

from lmcache_kit.errors import CacheStartFailed, ConfigError

if TYPE_CHECKING:
    from lmcache_kit.config import KitConfig

_UNIX_PATH_BYTES = 107
_CREDENTIALS = struct.Struct("3i")
_ELSEWHERE = "Set cache_socket to a path in a directory of yours on a local disk"
_LOCK_HINTS = {errno.ENOSPC: f"Free space there. Or: {_ELSEWHERE}"}


def socket_path(config: KitConfig) -> Path:
    """Return ``cache_socket``, or a name for the instance in this user's runtime directory.

    Raises ConfigError when it is too long for a Unix socket.
    """
    if config.cache_socket is not None:
        path = config.cache_socket.expanduser().absolute()
    else:
        name = blake3(config.lmcache_instance_id.encode()).hexdigest(16)
        path = runtime_dir() / f"{name}.sock"
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES:
        raise ConfigError(
            f"the cache process's socket path {str(path)!r} is longer than the "
            f"{_UNIX_PATH_BYTES} bytes that Unix sockets allow",
            hint="Set cache_socket to a shorter one",
        )
    return path


def runtime_dir() -> Path:
    """Return ``$XDG_RUNTIME_DIR/lmcache-kit`` if this user owns the parent, else one in /tmp."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and os.path.isabs(given):
        with contextlib.suppress(OSError):
            if os.stat(given).st_uid == os.getuid():
                return Path(given) / "lmcache-kit"
    return Path(f"/tmp/lmcache-kit-{os.getuid()}")  # noqa: S108 - secure_directory checks it


def secure_directory(directory: Path) -> None:
    """Make the directory (mode 0700), or check that only this user can access it.

    Raises CacheStartFailed when there can be no such directory, or another user could put a socket
    in its place.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise CacheStartFailed(
            f"no directory {str(directory)!r} for the cache process's socket: {error.strerror}",
            hint="Set cache_socket to a path in a directory that you own",
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        problem = "is not a directory"
    elif found.st_uid != os.getuid():
        problem = f"belongs to user {found.st_uid}, and this is user {os.getuid()}"
    elif found.st_mode & 0o077:
        problem = f"has mode {stat.S_IMODE(found.st_mode):04o}, so that others may use it"
    else:
        return
    raise CacheStartFailed(
        f"the cache process's directory {str(directory)!r} {problem}",
        hint="Give it to this user with mode 0700, or set cache_socket to a path elsewhere",
    )


def beside(path: Path, suffix: str) -> Path:
    """Return the path of a file that belongs to this socket."""
    return path.with_name(path.name + suffix)


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end of a Unix socket, from the kernel."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


class FileLock:
    """An flock, held until it is closed or its process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path) -> Self | None:
        """Take the lock, or return None when another process holds it.

        Raises CacheStartFailed when the file system has no locks, or no room for the file.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise
        except BlockingIOError:
            return None
        except OSError as error:
            raise CacheStartFailed(
                f"the cache process's lock {str(path)!r} cannot be taken: {error.strerror}",
                hint=_LOCK_HINTS.get(error.errno or 0, _ELSEWHERE),
            ) from error
        return cls(fd)

    def fileno(self) -> int:
        """Return the descriptor of the lock file."""
        return self._fd

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A process forked meanwhile has a copy of the descriptor: closing ours would not do.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serving_lock(path: Path) -> FileLock | None:
    """Lock the right to serve at a socket path; None when another process has it."""
    return FileLock.acquire(beside(path, ".lock"))


def starting_lock(path: Path) -> FileLock | None:
    """Lock the right to start a process for a socket path; None when another process has it."""
    return FileLock.acquire(beside(path, ".start"))


def listen(path: Path) -> socket.socket:
    """Listen at ``path``, mode 0600, in place of a dead process's socket.

    The caller holds the path's :func:`serving_lock`. Raises CacheStartFailed when something that is
    no socket lies there, or the system refuses one.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise CacheStartFailed(
                f"cache_socket {str(path)!r} exists and is not a socket",
                hint="Remove it or set cache_socket to another path",
            )
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise CacheStartFailed(
            f"the cache process cannot listen at {str(path)!r}: {error.strerror}", hint=_ELSEWHERE
        ) from error
    listener.setblocking(False)
    return listener
