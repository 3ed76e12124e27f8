"""A server that goes, hangs, comes back or talks nonsense: an error in time, and it goes on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from lmcache_kit_valkey_backend import client as client_module

from lmcache_kit.errors import BackendError
from plugins.valkey_backend.tests.calls import KEY, OTHER, Open, Pretend, Serve, got, put
from tests.support.proxies import hang_up
from tests.support.waiting import DEADLINE_S

if TYPE_CHECKING:
    from plugins.valkey_backend.tests.conftest import Served


def test_nothing_is_connected_before_the_first_call(serve: Serve, open_backend: Open) -> None:
    server = serve()
    server.kill()
    backend = open_backend(server.options())
    with pytest.raises(BackendError, match=rf"127.0.0.1:{server.port}.*(?i:refused)"):
        put(backend)


def test_a_server_that_comes_back_is_used_again(serve: Serve, open_backend: Open) -> None:
    server = serve()
    backend = open_backend(server.options())
    assert put(backend)
    server.kill()
    with pytest.raises(BackendError):
        got(backend)
    server.start()
    assert got(backend) is None
    assert put(backend)
    assert got(backend) == b"data"


def test_a_restart_between_two_calls_is_not_even_noticed(serve: Serve, open_backend: Open) -> None:
    server = serve()
    backend = open_backend(server.options())
    put(backend)
    server.kill()
    server.start()
    assert put(backend)


def test_connections_that_the_server_closed_are_made_anew(
    server: Served, open_backend: Open
) -> None:
    backend = open_backend(server.options())
    put(backend)
    with server.client() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal")
    assert got(backend) == b"data"


def test_a_connection_that_breaks_amid_a_command_is_made_anew_once(
    server: Served, pretend: Pretend, open_backend: Open
) -> None:
    made: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        made.append(connection)
        if len(made) != 2:
            connection.recv(1 << 10)  # and leave
        else:
            relay(server, bytes_per_s=1e9)(connection)

    backend = open_backend(pretend(serve, timeout_ms=5000))
    assert put(backend)
    hang_up(*made)
    with pytest.raises(BackendError, match="Is the server running"):
        got(backend)
    assert len(made) == 4


def test_a_frozen_server_costs_a_time_out(serve: Serve, open_backend: Open) -> None:
    server = serve()
    backend = open_backend(server.options(timeout_ms=300))
    put(backend)
    with server.frozen(), pytest.raises(BackendError, match="timeout_ms"):
        got(backend)
    assert got(backend) == b"data"


def test_a_connection_that_broke_amid_an_answer_gives_no_other_ones_answer(
    serve: Serve, open_backend: Open
) -> None:
    server = serve()
    backend = open_backend(server.options(timeout_ms=50, connections=1))
    put(backend, KEY, b"mine")
    put(backend, OTHER, b"other")
    for _ in range(5):
        with server.frozen(), pytest.raises(BackendError):
            got(backend, KEY)
        assert got(backend, OTHER) == b"other"


def test_who_finds_all_connections_in_use_is_told_so(
    server: Served, pretend: Pretend, open_backend: Open
) -> None:
    busy, over = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        if over.is_set():
            relay(server, bytes_per_s=1e9)(connection)
            return
        connection.recv(1 << 16)
        connection.sendall(b"+")
        busy.set()
        while not over.wait(0.01):
            connection.sendall(b"x")

    backend = open_backend(pretend(serve, connections=1, timeout_ms=1000))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(got, backend)
        assert busy.wait(DEADLINE_S)
        with pytest.raises(BackendError, match=r"all 1 .* Raise connections"):
            got(backend)
        over.set()  # its connection ends, and it asks again
        assert first.result(DEADLINE_S) is None
    assert got(backend) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading .*The server has just started"),
        ("MISCONF Redis is configured to save snapshots", "MISCONF .*server's log"),
        ("MOVED 3999 192.0.2.1:6381", "MOVED .*part of a cluster"),
        ("CLUSTERDOWN Hash slot not served", "CLUSTERDOWN .*part of a cluster"),
        ("ERR max number of clients reached", "max number of clients"),
    ],
)
def test_a_server_that_refuses_everything_is_quoted_with_what_to_do(
    pretend: Pretend, open_backend: Open, answer: str, message: str
) -> None:
    def refuse(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(f"-{answer}\r\n".encode())

    backend = open_backend(pretend(refuse))
    for call in (lambda: put(backend), lambda: got(backend), lambda: list(backend.scan())):
        with pytest.raises(BackendError, match=rf"127\.0\.0\.1:\d+: .*{message}"):
            call()


def test_what_is_no_such_server_at_all_is_a_backend_error(
    pretend: Pretend, open_backend: Open
) -> None:
    def greet(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    backend = open_backend(pretend(greet))
    with pytest.raises(BackendError, match="are url and TLS right"):
        got(backend)


def relay(server: Served, bytes_per_s: float) -> Callable[[socket.socket], None]:
    """What a connection says comes to a server, at this speed."""

    def pump(source: socket.socket, goal: socket.socket, pause_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                threading.Event().wait(pause_s * len(data))
                goal.sendall(data)
            goal.shutdown(socket.SHUT_WR)

    def serve(connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as onward:
            back = threading.Thread(target=pump, args=(onward, connection, 0.0))
            back.start()
            pump(connection, onward, 1 / bytes_per_s)
            back.join()

    return serve


def trickle(connection: socket.socket) -> None:
    """An answer without an end, or nearly so."""
    connection.recv(1 << 16)
    connection.sendall(b"+")
    never = threading.Event()
    for _ in range(2000):
        never.wait(0.01)
        connection.sendall(b"x")


def test_an_answer_that_never_ends_is_not_waited_for(
    pretend: Pretend, open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_CALL_S", 0.1)
    backend = open_backend(pretend(trickle, timeout_ms=200))
    with pytest.raises(BackendError, match="too long"):
        got(backend)


def test_closing_ends_an_answer_that_never_ends(pretend: Pretend, open_backend: Open) -> None:
    asked, ended, ends = threading.Event(), threading.Event(), []

    def serve(connection: socket.socket) -> None:
        asked.set()
        trickle(connection)
        ended.set()

    backend = open_backend(pretend(serve, timeout_ms=60_000))

    def ask() -> None:
        try:
            ends.append(got(backend))
        except BackendError as error:
            ends.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(20)
    backend.close()
    assert not ended.is_set()
    thread.join(20)
    assert [str(end).partition(" is ")[2] for end in ends] == ["closed"]


def test_a_slow_link_may_take_longer_than_the_time_out_for_a_large_blob(
    server: Served, pretend: Pretend, open_backend: Open
) -> None:
    backend = open_backend(pretend(relay(server, bytes_per_s=10e6), timeout_ms=1000))
    assert put(backend, data=bytes(20 << 20))  # two seconds
    assert got(backend) == bytes(20 << 20)
