"""Real cache processes in a directory of their own, and what kills them in the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.config import KitConfig
from lmcache_kit.process.client import CacheClient, Reconnect
from lmcache_kit.protocol import framing
from lmcache_kit.protocol import local as protocol
from lmcache_kit.protocol.local import MAX_FRAME_BYTES, Answer, Hello, Request
from lmcache_kit.service.launch import open_client
from tests.support.waiting import DEADLINE_S as WAIT_S
from tests.support.waiting import eventually

DEADLINE_S = 20.0
QUICK = Reconnect(first_s=0.02, most_s=0.1, steady_s=0.0, keep_memory_s=0.2)


class Connect(Protocol):
    """Open a client, ready; ``keys`` are of its configuration."""

    def __call__(
        self,
        role: str = ...,
        *,
        rank: int = ...,
        world_size: int = ...,
        form: RankLayout | None = ...,
        **keys: object,
    ) -> CacheClient: ...


class Configure(Protocol):
    def __call__(self, **keys: object) -> KitConfig: ...


class Eventually(Protocol):
    def __call__(self, holds: Callable[[], object], what: str = ...) -> object: ...


class ProcessesAt(Protocol):
    def __call__(self, folder: Path) -> list[int]: ...


class Script(Protocol):
    """Run a script in a process of its own; ``config`` is defined in it."""

    def __call__(
        self, body: str, *, wait_for: str = ..., stderr: int | None = ..., **keys: object
    ) -> subprocess.Popen[str]: ...


class Raw(Protocol):
    def __call__(self) -> RawConnection: ...


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, since Unix sockets allow no long ones; private, as mkdtemp makes it."""
    path = Path(tempfile.mkdtemp(prefix="lk-"))
    yield path
    for pid in processes_at(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes_at(path))
    shutil.rmtree(path)


@pytest.fixture
def configure(folder: Path) -> Configure:
    def configure(**keys: object) -> KitConfig:
        defaults: dict[str, object] = {
            "cache_socket": folder / "c.sock",
            "cache_linger_s": 0.2,
            "max_local_cpu_size": 1 / 64,
        }
        return KitConfig(**{**defaults, **keys})  # type: ignore[arg-type]

    return configure


@pytest.fixture
def connect(configure: Configure) -> Iterator[Connect]:
    """Opens clients that are ready, and closes them."""
    with contextlib.ExitStack() as clients:

        def connect(
            role: str = "worker",
            *,
            rank: int = 0,
            world_size: int = 1,
            form: RankLayout | None = None,
            **keys: object,
        ) -> CacheClient:
            client = open_client(
                configure(**keys),
                role=role,  # type: ignore[arg-type]
                rank=rank,
                world_size=world_size,
                form=form,
                wait_ready=True,
                reconnect=QUICK,
            )
            clients.callback(client.close)
            return client

        yield connect


@pytest.fixture(name="eventually")
def eventually_fixture() -> Eventually:
    return eventually


def ends(call: Callable[[], object]) -> bool:
    """Whether a call returns at all, within a time that bounds hangs."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    return not thread.is_alive()


@pytest.fixture(name="processes_at")
def processes_at_fixture() -> ProcessesAt:
    return processes_at


def processes_at(folder: Path) -> list[int]:
    """Cache processes whose socket is in this folder; zombies have no command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"lmcache_kit.service" in words and os.fsencode(folder / "c.sock") in words:
                    found.append(int(entry.name))
    return found


@pytest.fixture
def script(configure: Configure) -> Iterator[Script]:
    started: list[subprocess.Popen[str]] = []

    def run(
        body: str, *, wait_for: str = "", stderr: int | None = None, **keys: object
    ) -> subprocess.Popen[str]:
        prelude = f"""
            import os, signal, sys, time
            from lmcache_kit.cache.records import StoreItem
            from lmcache_kit.config import KitConfig
            from lmcache_kit.keys import pack_tokens
            from lmcache_kit.service.launch import open_client
            config = KitConfig.from_json({configure(**keys).to_json()!r})
        """
        source = textwrap.dedent(prelude) + textwrap.dedent(body)
        process = subprocess.Popen(
            [sys.executable, "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        started.append(process)
        if wait_for:
            assert process.stdout
            assert process.stdout.readline().strip() == wait_for
        return process

    yield run
    for process in started:
        process.kill()
        with process:  # closes its pipes
            process.wait()


class RawConnection:
    """Bytes on the local socket, without a client's manners."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))

    def send(self, data: bytes) -> None:
        # A server that has had enough may close while we still send.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def ask(self, request: Request, request_id: int = 1) -> Answer:
        self.send(protocol.encode(request_id, request))
        answer_id, answer = self.next_answer()
        assert answer_id == request_id
        return answer

    def next_answer(self) -> tuple[int, Answer]:
        body = framing.receive(self.socket, MAX_FRAME_BYTES, DEADLINE_S)
        assert body is not None, "the connection ended"
        return protocol.decode_answer(body)

    def hello(self, **changes: object) -> Answer:
        fields = {"role": "worker", "instance_id": "lmcache_default_instance", "pid": 1}
        return self.ask(Hello(**{"version": protocol.VERSION, **fields, **changes}))  # type: ignore[arg-type]

    @property
    def closed_by_peer(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def raw(folder: Path) -> Iterator[Raw]:
    opened: list[RawConnection] = []

    def raw() -> RawConnection:
        opened.append(RawConnection(folder / "c.sock"))
        return opened[-1]

    yield raw
    for connection in opened:
        connection.socket.close()
