"""Connect clients to a cache process: spawn one, attach to one, or run one in a thread.

A spawned process is started once, whatever clients race for it:

1. Connect. If that succeeds, done.
2. Take the starting lock without waiting; another client that holds it is starting one: poll.
3. Take the serving lock without waiting; a process that holds it starts or ends: poll.
4. Release the serving lock and start a process, which takes it. It reports over a pipe that it
   listens, or why it cannot.

A start that fails for what is wrong on this machine is no error of the configuration: the client
logs it, goes on without a cache process, and tries again.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import lmcache_kit
from lmcache_kit import errors
from lmcache_kit.errors import (
    CacheStartFailed,
    CacheTimeout,
    CacheUnavailable,
    ConfigError,
    KitError,
    PluginError,
)
from lmcache_kit.process import paths
from lmcache_kit.process.client import CacheClient, Reconnect
from lmcache_kit.process.log_relay import LogRelay
from lmcache_kit.process.paths import socket_path
from lmcache_kit.protocol import local as protocol
from lmcache_kit.service import service

if TYPE_CHECKING:
    from lmcache_kit.cache.index.entries import RankLayout
    from lmcache_kit.config import KitConfig
    from lmcache_kit.keys import Namespace

__all__ = ["open_client", "socket_path"]

logger = logging.getLogger(__name__)

_LOG_BYTES = 1 << 20
_POLL_S = 0.05
_REPORTED = (
    errors.CacheUnavailable,  # another process serves there: try again soon
    errors.ConfigError,
    errors.DuplicateName,
    errors.PluginBroken,
    errors.PluginError,
    errors.PluginNotFound,
)


def open_client(
    config: KitConfig,
    *,
    role: Literal["scheduler", "worker", "tool"],
    rank: int = 0,
    world_size: int = 1,
    namespace: Namespace | None = None,
    form: RankLayout | None = None,
    wait_ready: bool = False,
    reconnect: Reconnect | None = None,
) -> CacheClient:
    """Return a client of the instance's cache process, which ``cache_process`` may start.

    ``form``: layout of a worker's payloads; without it they cannot be encoded.

    The client connects in the background. ``wait_ready`` waits for up to
    ``cache_start_timeout_s``, and raises ConfigError or PluginError when no cache can be composed;
    a late or absent process is not an error, nor is one that this machine does not let start.
    ``embedded`` raises these errors at once.

    The worker of rank 0 relays the warnings of a spawned process into its own log.
    """
    path = socket_path(config)
    on_close: Callable[[], None] | None = None
    dial: Callable[[threading.Event], socket.socket] = lambda _: _connect(path)  # noqa: E731
    settings = ""
    if config.cache_process == "spawn":
        dial = _Spawner(config, path)
        settings = service.settings_digest(config)
        if role == "worker" and rank == 0:
            on_close = _relay_log(path)
    elif config.cache_process == "embedded":
        dial = share = _Share(config, path)
        on_close = share.close
    client = CacheClient(
        dial,
        protocol.Hello(
            version=protocol.VERSION,
            role=role,
            instance_id=config.lmcache_instance_id,
            pid=os.getpid(),
            rank=rank,
            world_size=world_size,
            namespace=namespace,
            settings=settings,
            layout=form.layout if form else None,
            rope=form.rope if form else None,
            first_head=form.first_head if form else 0,
        ),
        timeout_s=config.blocking_timeout_secs,
        reconnect=reconnect,
        on_close=on_close,
    )
    if wait_ready:
        try:
            client.wait_ready(config.cache_start_timeout_s)
        except BaseException:
            client.close()
            raise
    return client


def _relay_log(path: Path) -> Callable[[], None]:
    """Say where a spawned process logs, and relay its warnings; return a function that stops it."""
    log = paths.beside(path, ".log")
    logger.info("the cache process logs to %s; its warnings and errors come here, too", log)
    return LogRelay(log).close


def _connect(path: Path) -> socket.socket:
    """Connect to the socket. Raises CacheUnavailable, at once, when nothing listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)  # a stopped process with a full backlog would block connect
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise CacheUnavailable(
            f"no cache process listens at {str(path)!r}: {error.strerror}"
        ) from error
    return connection


class _Spawner:
    """Connects, and starts a cache process when none listens."""

    def __init__(self, config: KitConfig, path: Path) -> None:
        self._config = config
        self._path = path

    def __call__(self, stop: threading.Event) -> socket.socket:
        timeout_s = self._config.cache_start_timeout_s
        deadline = time.monotonic() + timeout_s
        started = False
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                return _connect(self._path)
            except CacheUnavailable:
                if started:
                    raise  # it ended at once; the client waits before the next attempt
            started = self._start_unless_started(stop, deadline)
            if not started:
                stop.wait(_POLL_S)
        raise CacheTimeout(f"the cache process did not start within {timeout_s:g} s")

    def _start_unless_started(self, stop: threading.Event, deadline: float) -> bool:
        """Start a process. Returns False while another one is starting or ending.

        Raises CacheStartFailed when the system refuses a folder, a lock, a file or a process.
        """
        paths.secure_directory(self._path.parent)
        starting = paths.starting_lock(self._path)
        if starting is None:
            return False
        with starting:
            serving = paths.serving_lock(self._path)
            if serving is None:
                return False
            serving.close()
            with _system_refuses(self._path):
                self._start(stop, deadline)
            return True

    def _start(self, stop: threading.Event, deadline: float) -> None:
        """Start a process and wait until it listens. Raises the error that it reports."""
        status, child_status = os.pipe()
        try:
            try:
                self._launch(child_status, deadline)
            finally:
                os.close(child_status)
            line = _read_line(status, stop, deadline)
        finally:
            os.close(status)
        report = json.loads(line) if line.endswith(b"\n") else None
        if report is None:
            if stop.is_set() or time.monotonic() >= deadline:
                return
            log = paths.beside(self._path, ".log")
            raise CacheStartFailed(
                "the cache process ended as it started", hint=f"Its log is {log}"
            )
        if report["error"]:
            raise _reported_error(report)

    def _launch(self, status: int, deadline: float) -> None:
        command = [
            *(sys.executable, "-P", "-m", "lmcache_kit.service"),
            *("--socket", str(self._path)),
            *("--status-fd", str(status)),
        ]
        log = _open_log(paths.beside(self._path, ".log"))
        try:
            launcher = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                pass_fds=(status,),
                start_new_session=True,
            )
        finally:
            os.close(log)
        try:
            launcher.communicate(
                self._config.to_json().encode(), timeout=max(0.0, deadline - time.monotonic())
            )
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.communicate()


class _Share:
    """A client's share of the embedded cache, which the client takes as soon as there can be one.

    Raises ConfigError or PluginError when no cache can be composed.
    """

    def __init__(self, config: KitConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._leave: Callable[[], None] | None = None
        self._taken = False
        try:
            self._take()
        except (ConfigError, PluginError):
            raise
        except (KitError, OSError):
            pass  # the client meets it again, and logs it

    def __call__(self, stop: threading.Event) -> socket.socket:
        self._take()
        return _connect(self._path)

    def close(self) -> None:
        """Give the share back."""
        if self._leave:
            self._leave()

    def _take(self) -> None:
        if self._taken:
            return
        try:
            self._leave = _Embedded.share(self._config, self._path)
        except (CacheUnavailable, ConfigError, PluginError):
            raise
        except (KitError, OSError) as error:
            message = getattr(error, "message", str(error))
            raise CacheStartFailed(message, hint=getattr(error, "hint", "")) from error
        self._taken = True


class _Embedded:
    """A cache on a thread of this process, shared by the clients in the process."""

    _by_path: ClassVar[dict[Path, _Embedded]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, config: KitConfig, path: Path, lock: paths.FileLock) -> None:
        self._path = path
        self._lock = lock
        self._users = 0
        self._service = service.CacheService(config)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lmcache-kit-cache", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error:
            raise self._error

    @classmethod
    def share(cls, config: KitConfig, path: Path) -> Callable[[], None] | None:
        """Start the cache unless it runs; returns a function to call when its user closes.

        None when another process serves there.
        """
        with cls._guard:
            cache = cls._by_path.get(path)
            if cache is None:
                paths.secure_directory(path.parent)
                lock = paths.serving_lock(path)
                if lock is None:
                    return None
                try:
                    cache = cls._by_path[path] = cls(config, path, lock)
                except BaseException:
                    lock.close()
                    raise
            cache._users += 1
            return cache._leave

    def _leave(self) -> None:
        with self._guard:
            self._users -= 1
            if not self._users:
                self._stop()

    def _stop(self) -> None:
        self._by_path.pop(self._path, None)
        self._service.stop()
        self._thread.join()
        self._lock.close()

    def _run(self) -> None:
        try:
            self._service.run(self._path, self._ready.set)
        except (KitError, OSError) as error:
            self._error = error
        finally:
            self._ready.set()


def try_folder(path: Path) -> None:
    """Do what a start does in the folder of a socket. Raises CacheStartFailed."""
    paths.secure_directory(path.parent)
    for lock in (paths.starting_lock(path), paths.serving_lock(path)):
        if lock:
            lock.close()
    with _system_refuses(path):
        os.close(_open_log(paths.beside(path, ".log")))


@contextmanager
def _system_refuses(path: Path) -> Iterator[None]:
    """Turn an OSError into CacheStartFailed."""
    try:
        yield
    except KitError:
        raise
    except OSError as error:
        raise CacheStartFailed(
            f"no cache process can be started for {str(path)!r}: {error}",
            hint="See the limits of this user and the room in that folder",
        ) from error


def _read_line(fd: int, stop: threading.Event, deadline: float) -> bytes:
    """Read until a newline, the end of file, ``stop`` or the deadline."""
    line = b""
    while not line.endswith(b"\n") and not stop.is_set() and time.monotonic() < deadline:
        if select.select([fd], [], [], _POLL_S)[0]:
            data = os.read(fd, 65536)
            if not data:
                break
            line += data
    return line


def _reported_error(report: dict[str, str]) -> KitError:
    """Return the error that the process reported. What is no mistake of the configuration is
    trouble of this machine."""
    kinds = {kind.__name__: kind for kind in _REPORTED}
    kind = kinds.get(report["error"], CacheStartFailed)
    return kind(report["message"], hint=report["hint"])


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    if os.fstat(fd).st_size > _LOG_BYTES:
        os.ftruncate(fd, 0)
    return fd


def _environment() -> dict[str, str]:
    """Return this environment, changed so that the process imports this same lmcache_kit."""
    environment = dict(os.environ)
    root = str(Path(lmcache_kit.__file__).parents[1])
    if root != sysconfig.get_path("purelib"):
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else root
    return environment
