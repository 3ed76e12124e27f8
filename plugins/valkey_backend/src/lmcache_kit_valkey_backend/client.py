"""Commands to the server, whose failures are BackendError."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from valkey import BlockingConnectionPool
from valkey.connection import DefaultParser, PythonRespSerializer
from valkey.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    ValkeyError,
)
from valkey.exceptions import ConnectionError as Disconnected
from valkey.exceptions import TimeoutError as TooLate

from lmcache_kit.errors import BackendError
from lmcache_kit_valkey_backend.options import ValkeyOptions

MAX_CONNECT_S = 0.5
MAX_CALL_S = 20.0
"""What a call may take beyond its time-out, as long as bytes go to and fro."""
_STEP_BYTES = 1 << 20
_JOIN_BELOW_BYTES = 6000
Command: TypeAlias = Sequence[bytes | memoryview | str | int]

_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (AuthenticationError, "Set user and password in url, or password_file"),
    (NoPermissionError, "The plugin's README has the rights it needs"),
    (ReadOnlyError, "Name the primary in url, not a replica"),
    (BusyLoadingError, "It has just started; wait until it has read its data"),
    (TooLate, "It is busy, stuck or cut off; see timeout_ms"),
    (ResponseError, "Look at the server's log and configuration"),
    (Exception, "Is it running, and are url and TLS right?"),
)
"""The first that an error is one of."""


class NotAllowed(BackendError):
    """The user may not do that."""


class Server:
    """A pool of connections, made when they are needed: a server that is down is noticed by the
    first command. A connection that the server has closed meanwhile is made anew, once."""

    def __init__(self, options: ValkeyOptions) -> None:
        self._name = options.server
        timeout_s = options.timeout_ms / 1000
        more: dict[str, Any] = {}
        if options.password_file is not None:
            more["password"] = options.password()
        if options.encrypted:
            files = options.tls()
            more |= {
                "ssl_ca_certs": files["ca"],
                "ssl_certfile": files["cert"],
                "ssl_keyfile": files["key"],
                "ssl_cert_reqs": "required",
                "ssl_check_hostname": True,
            }
        make: Any = BlockingConnectionPool.from_url  # untyped
        self._pool: Any = make(
            options.url.get_secret_value(),
            max_connections=options.connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=min(timeout_s, MAX_CONNECT_S),
            socket_read_size=_STEP_BYTES,
            parser_class=partial(_Reader, self._check),
            # Sends long values from where they lie; the default one copies them.
            command_packer=PythonRespSerializer(_JOIN_BELOW_BYTES, _encoded),
            **more,
        )
        self._changed = threading.Condition()
        self._calls = 0
        self._most_calls = options.connections
        self._timeout_s = timeout_s
        self._this_call = threading.local()
        self._open = True

    def do(self, *command: bytes | memoryview | str | int) -> Any:
        """What the server answers to one command; see :meth:`do_all`."""
        [answer] = self.do_all([command])
        return answer

    def do_all(self, commands: Sequence[Command]) -> list[Any]:
        """What the server answers to each of them, in one round trip. One that finds no memory or a
        foreign value has that ResponseError for its answer. Raises BackendError, which names the
        server, the cause and the remedy."""
        if not commands:
            return []
        try:
            with self._call():
                try:
                    answers = self._exchange(commands)
                except Disconnected as error:
                    if type(error) is not Disconnected:
                        raise
                    answers = self._exchange(commands)
        except BackendError:
            raise
        except (ValkeyError, OSError, ValueError) as error:
            raise self._failed(error) from None
        for answer in answers:
            if isinstance(answer, ResponseError) and not is_about_one(answer):
                raise self._failed(answer)
        return answers

    def close(self) -> None:
        """Take nothing more, and end what is in flight: its time-out is short."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._calls)
        self._pool.disconnect()

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._calls < self._most_calls or not self._open, self._timeout_s
            )
            if not self._open:
                raise self._closed()
            if not free:
                raise BackendError(
                    f"{self._name}: all {self._most_calls} connections are in use",
                    hint="Raise connections or timeout_ms",
                )
            self._calls += 1
        self._this_call.ends = time.monotonic() + self._timeout_s + MAX_CALL_S
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        connection = self._pool.get_connection("")
        try:
            connection.send_packed_command(self._steps(connection.pack_commands(commands)))
            return [_answer(connection) for _ in commands]
        except BaseException:
            connection.disconnect()  # or the next call would get the rest of these answers
            raise
        finally:
            self._pool.release(connection)

    def _steps(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Pieces to send, each short: the time-out is for one as a whole."""
        for piece in pieces:
            for start in range(0, len(piece), _STEP_BYTES):
                self._check()
                yield piece[start : start + _STEP_BYTES] if len(piece) > _STEP_BYTES else piece

    def _check(self) -> None:
        """Ends this thread's call when it has taken too long, or when nobody wants it any more."""
        if not self._open or time.monotonic() > self._this_call.ends:
            raise TooLate("it goes on for too long")

    def _closed(self) -> BackendError:
        return BackendError(f"the connection to {self._name} is closed")

    def _failed(self, error: Exception) -> BackendError:
        if not self._open:
            return self._closed()
        text = str(error).strip().rstrip(".") or type(error).__name__
        remedy = next(remedy for kind, remedy in _REMEDIES if isinstance(error, kind))
        if text.startswith(("MOVED ", "CLUSTERDOWN ")):
            remedy = "It is part of a cluster; name one that stands alone"
        kind = NotAllowed if isinstance(error, NoPermissionError) else BackendError
        return kind(f"{self._name}: {text}", hint=remedy)


class _Reader(DefaultParser):  # type: ignore[misc, valid-type]
    """Reads answers, and calls ``check`` before each part of one."""

    def __init__(self, check: Callable[[], None], socket_read_size: int) -> None:
        super().__init__(socket_read_size)
        self._check = check

    def read_from_socket(self, *args: Any, **more: Any) -> Any:
        self._check()
        return super().read_from_socket(*args, **more)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as refusal:
        return refusal


def is_about_one(error: ResponseError) -> bool:
    """Whether a refusal is about a command alone: no memory left for it, or somebody else's value
    under its key. Any other one is the server's failure."""
    return is_out_of_memory(error) or is_foreign(error)


def is_out_of_memory(answer: object) -> bool:
    """Whether that is why a command was refused."""
    return isinstance(answer, OutOfMemoryError)


def is_foreign(answer: object) -> bool:
    """Whether something else than a blob lies under the key."""
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def _encoded(word: bytes | memoryview | str | int) -> bytes | memoryview:
    """What goes over the wire for one word of a command."""
    return word if isinstance(word, bytes | memoryview) else str(word).encode()
