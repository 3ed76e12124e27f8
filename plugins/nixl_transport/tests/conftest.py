"""Two cache processes: this one, and others that are started by it."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.probe import why_not
from lmcache_kit_nixl_transport.transport import NixlTransport
from xxhash import xxh3_64_intdigest

from lmcache_kit.interfaces import ReadableRegion, Region
from tests.support.processes import freeze

SLAB_BYTES = 64 << 20
PATIENCE_S = 30.0


class Remote:
    """A process with a slab and a transport; methods of ``peer.Peer`` by name."""

    def __init__(
        self, slab_bytes: int = SLAB_BYTES, host: str = "127.0.0.1", *, ucx_tls: str = "", **options
    ) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **({"UCX_TLS": ucx_tls} if ucx_tls else {})}
        with theirs:
            said = msgspec.json.encode(options).decode()
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("peer.py"), str(theirs.fileno()),
                 str(slab_bytes), host, said],
                pass_fds=[theirs.fileno()], env=environment,
            )  # fmt: skip
        self._orders = Connection(ours.detach())

    @cached_property
    def error(self) -> str:
        """Why it did not start, if it did not; waits for it."""
        return self._answer().get("error", "")

    def ask(self, name: str, *arguments: Any) -> Any:
        assert not self.error, self.error
        self._orders.send_bytes(msgspec.msgpack.encode([name, *arguments]))
        answer = self._answer()
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def signal(self, number: signal.Signals) -> None:
        assert not self.error, self.error
        if number == signal.SIGSTOP:
            freeze(self.process.pid)
            return
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(PATIENCE_S)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        self._orders.close()

    def _answer(self) -> dict[str, Any]:
        assert self._orders.poll(PATIENCE_S), "the peer does not answer"
        return msgspec.msgpack.decode(self._orders.recv_bytes())


class Here:
    """This process's slab and transport."""

    def __init__(self, slab_bytes: int = SLAB_BYTES, **options: Any) -> None:
        self.slab = mmap.mmap(-1, slab_bytes)
        self.memory = memoryview(self.slab)
        self.transport = NixlTransport(self.memory, "127.0.0.1", NixlOptions(**options))

    def connect(self, remote: Remote, timeout_s: float = PATIENCE_S):
        return self.connect_to(remote.ask("address"), timeout_s)

    def connect_to(self, address: bytes, timeout_s: float = PATIENCE_S):
        return self.transport.connect(address, no_dial, timeout_s)

    def offer(self, *offered: Region) -> bytes:
        return self.transport.offer([ReadableRegion(each, self.checksum(each)) for each in offered])

    def checksum(self, region: Region) -> int:
        return xxh3_64_intdigest(self.memory[region.offset : region.offset + region.nbytes])

    def end(self) -> None:
        self.transport.close()
        self.memory.release()
        self.slab.close()


def no_dial(timeout_s: float) -> socket.socket:
    raise AssertionError("NIXL has connections of its own")


def regions(sizes: list[int], gap: int = 64) -> list[Region]:
    found, at = [], 0
    for size in sizes:
        found.append(Region(at, size))
        at += size + gap
    return found


@pytest.fixture(autouse=True)
def _nixl_is_installed() -> None:
    assert not why_not(), why_not()


@pytest.fixture(scope="session")
def owner() -> Iterator[Remote]:
    """A peer that nothing bad happens to, full of random bytes."""
    assert not why_not(), why_not()
    remote = Remote()
    remote.ask("fill", 1)
    yield remote
    remote.end()


@pytest.fixture
def start() -> Iterator[Callable[..., Remote]]:
    """Starts peers."""
    started: list[Remote] = []

    def start(*arguments: Any, **options: Any) -> Remote:
        started.append(Remote(*arguments, **options))
        return started[-1]

    yield start
    for remote in started:
        remote.end()


@pytest.fixture
def make_here() -> Iterator[Callable[..., Here]]:
    made: list[Here] = []

    def make(**options: Any) -> Here:
        made.append(Here(**options))
        return made[-1]

    yield make
    for here in made:
        here.end()


@pytest.fixture
def here(make_here: Callable[..., Here]) -> Here:
    return make_here()
