"""Client of the server: pipelines of commands, with failures as BackendError."""

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
from valkey.exceptions import ConnectionError as ServerDisconnected
from valkey.exceptions import TimeoutError as ServerTimeout

from lmcache_kit.errors import BackendError
from lmcache_kit_valkey_backend.options import ValkeyOptions

MAX_CONNECT_S = 0.5
MAX_CALL_S = 20.0
"""Longest time of a call beyond its time-out, while bytes still arrive or leave."""
_PART_BYTES = 1 << 20
_JOIN_BELOW_BYTES = 6000
Command: TypeAlias = Sequence[bytes | memoryview | str | int]

_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (AuthenticationError, "Set user and password in url, or password_file"),
    (NoPermissionError, "The plugin's README has the commands that the user needs"),
    (ReadOnlyError, "Name the primary in url, not a replica"),
    (BusyLoadingError, "The server has just started; wait until it has loaded its data"),
    (ServerTimeout, "The server is busy, stuck or unreachable; see timeout_ms"),
    (ResponseError, "Look at the server's log and configuration"),
    (Exception, "Is the server running, and are url and TLS right?"),
)
"""Remedies by class of error; the first match counts."""


class PermissionDenied(BackendError):
    """The server's ACL does not allow the command to this user."""


class ValkeyClient:
    """Run pipelines of commands over a pool of connections, from any thread.

    Connections are opened on demand, so that the first command detects a server that is down. A
    connection that the server has closed meanwhile is reopened, once.
    """

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
            socket_read_size=_PART_BYTES,
            parser_class=partial(_Parser, self._check),
            # Sends long values from where they lie; the default packer copies them.
            command_packer=PythonRespSerializer(_JOIN_BELOW_BYTES, _encoded),
            **more,
        )
        self._changed = threading.Condition()
        self._calls = 0
        self._most_calls = options.connections
        self._timeout_s = timeout_s
        self._this_call = threading.local()
        self._open = True

    def execute(self, *command: bytes | memoryview | str | int) -> Any:
        """Run one command and return its answer; see :meth:`execute_pipeline`."""
        [answer] = self.execute_pipeline([command])
        return answer

    def execute_pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands in one round trip and return their answers.

        The answer is the ResponseError for a command that finds no memory or a value of the wrong
        type. Raises BackendError with the server, the cause and the remedy.
        """
        if not commands:
            return []
        try:
            with self._call():
                try:
                    answers = self._exchange(commands)
                except ServerDisconnected as error:
                    if type(error) is not ServerDisconnected:
                        raise
                    answers = self._exchange(commands)
        except BackendError:
            raise
        except (ValkeyError, OSError, ValueError) as error:
            raise self._failed(error) from None
        for answer in answers:
            if isinstance(answer, ResponseError) and not is_refusal_of_one_command(answer):
                raise self._failed(answer)
        return answers

    def close(self) -> None:
        """Refuse new calls and wait for those in flight, whose time-outs are short."""
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
            connection.send_packed_command(self._split(connection.pack_commands(commands)))
            return [_answer(connection) for _ in commands]
        except BaseException:
            connection.disconnect()  # else the next call would read the rest of these answers
            raise
        finally:
            self._pool.release(connection)

    def _split(self, buffers: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Yield the buffers in parts of at most 1 MiB, since the time-out is that of one send."""
        for part in buffers:
            for start in range(0, len(part), _PART_BYTES):
                self._check()
                yield part[start : start + _PART_BYTES] if len(part) > _PART_BYTES else part

    def _check(self) -> None:
        """Raise ServerTimeout when this thread's call takes too long or the client is closed."""
        if not self._open or time.monotonic() > self._this_call.ends:
            raise ServerTimeout("the call takes too long")

    def _closed(self) -> BackendError:
        return BackendError(f"the connection to {self._name} is closed")

    def _failed(self, error: Exception) -> BackendError:
        if not self._open:
            return self._closed()
        text = str(error).strip().rstrip(".") or type(error).__name__
        remedy = next(remedy for kind, remedy in _REMEDIES if isinstance(error, kind))
        if text.startswith(("MOVED ", "CLUSTERDOWN ")):
            remedy = "The server is part of a cluster; name a standalone server or a primary in url"
        kind = PermissionDenied if isinstance(error, NoPermissionError) else BackendError
        return kind(f"{self._name}: {text}", hint=remedy)


class _Parser(DefaultParser):  # type: ignore[misc, valid-type]
    """Parser of answers that calls ``check`` before each read from the socket."""

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


def is_refusal_of_one_command(error: ResponseError) -> bool:
    """Whether an error concerns one command alone: no memory, or a value of the wrong type.

    All other errors count as failures of the server.
    """
    return is_out_of_memory(error) or is_wrong_type(error)


def is_out_of_memory(answer: object) -> bool:
    """Whether the server refused the command for lack of memory."""
    return isinstance(answer, OutOfMemoryError)


def is_wrong_type(answer: object) -> bool:
    """Whether the key holds a value that is no hash."""
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def _encoded(word: bytes | memoryview | str | int) -> bytes | memoryview:
    """Encode one argument of a command."""
    return word if isinstance(word, bytes | memoryview) else str(word).encode()
