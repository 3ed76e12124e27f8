"""Moves over a network that damages, cuts and stalls: nothing wrong is kept, nothing is lost."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Eventually, MakePlace, Place

TOKENS = range(16 * 24 + 5)
Tamper = Callable[[int, bytes], bytes | None]
"""Takes the number of bytes that came from the source before, over all connections, and the next
ones; returns what to pass on, None to hang up on everybody."""


class Network:
    """A network between two peers: a proxy that passes on what comes from the source through
    ``tamper``. ``passed`` counts those bytes."""

    def __init__(self, url: str) -> None:
        host, _, port = url.partition(":")
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.tamper: Tamper = lambda _, data: data
        self.passed = 0
        self.stalled = threading.Event()
        self.flowing = threading.Event()
        self.flowing.set()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def cut(self) -> None:
        """Hang up on everybody."""
        with self._lock:
            sockets = self._sockets[1:]
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.flowing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(20)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                with self._lock:
                    self._sockets += [near, far]
                self._spawn(self._pass, near, far, False)
                self._spawn(self._pass, far, near, True)

    def _pass(self, one: socket.socket, other: socket.socket, from_source: bool) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if from_source:
                    with self._lock:
                        before, self.passed = self.passed, self.passed + len(data)
                    self.flowing.wait()
                    told = self.tamper(before, data)
                    if told is None:
                        break
                    data = told
                other.sendall(data)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()


@pytest.fixture
def network(source: Place) -> Iterator[Network]:
    network = Network(source.peer.url)
    yield network
    network.close()


@pytest.fixture
def length(make_place: MakePlace) -> int:
    """How many bytes a move of TOKENS takes."""
    source, goal = make_place("source"), make_place("goal")
    network = Network(source.peer.url)
    source.store(TOKENS)
    assert goal.move(source, TOKENS, url=network.url).state == "done"
    network.close()
    return network.passed


def flip(at: int) -> Tamper:
    def tamper(before: int, data: bytes) -> bytes:
        if not before <= at < before + len(data):
            return data
        damaged = bytearray(data)
        damaged[at - before] ^= 0x10
        return bytes(damaged)

    return tamper


def cut(at: int) -> Tamper:
    return lambda before, data: data if before + len(data) <= at else None


@pytest.mark.parametrize("place", range(20))
def test_a_damaged_byte_is_noticed_wherever_it_is(
    source: Place, goal: Place, network: Network, length: int, place: int
) -> None:
    source.store(TOKENS)
    network.tamper = flip(random.Random(place).randrange(length))
    outcome = goal.start(goal.request(source, TOKENS, url=network.url), deadline_s=5).outcome
    network.tamper = lambda _, data: data
    assert outcome.state in ("done", "partial", "failed", "expired")
    assert max(goal.hit(TOKENS), source.hit(TOKENS)) == len(TOKENS)
    if outcome.state == "done":
        assert goal.hit(TOKENS) == len(TOKENS)


def test_a_chunk_that_the_network_damaged_is_read_again(
    source: Place, goal: Place, network: Network, length: int
) -> None:
    source.store(TOKENS)
    network.tamper = flip(length // 2)
    outcome = goal.move(source, TOKENS, url=network.url)
    assert (outcome.state, outcome.tokens) == ("done", len(TOKENS))
    assert goal.hit(TOKENS) == len(TOKENS)
    assert source.stats()["corrupt_total"] == 0


@pytest.mark.parametrize("tenth", range(1, 10))
def test_a_cut_in_the_middle_loses_nothing(
    source: Place, goal: Place, network: Network, length: int, tenth: int
) -> None:
    source.store(TOKENS)
    network.tamper = cut(length * tenth // 10)
    outcome = goal.move(source, TOKENS, url=network.url)
    assert outcome.state in ("partial", "failed")
    assert outcome.message
    assert source.hit(TOKENS) == len(TOKENS)
    network.tamper = lambda _, data: data
    again = goal.move(source, TOKENS, url=network.url)
    assert (again.state, again.tokens) == ("done", len(TOKENS))
    assert goal.hit(TOKENS) == len(TOKENS)


def test_a_network_that_stalls_ends_the_move_by_its_deadline_and_nothing_lands_later(
    source: Place, goal: Place, network: Network, length: int, eventually: Eventually
) -> None:
    source.store(TOKENS)

    def stall(before: int, data: bytes) -> bytes:
        if before > length // 2:
            network.flowing.clear()
            network.flowing.wait()
        return data

    network.tamper = stall
    outcome = goal.start(goal.request(source, TOKENS, url=network.url), deadline_s=1.0).outcome
    assert outcome.state == "expired"
    eventually(lambda: goal.idle)
    goal.store(range(9000, 9000 + 16 * 60))
    network.tamper = lambda _, data: data
    network.flowing.set()
    network.cut()
    assert goal.hit(range(9000, 9000 + 16 * 60)) == 16 * 60
    assert source.hit(TOKENS) == len(TOKENS)


def test_links_that_were_cut_while_nobody_used_them_are_made_anew(
    source: Place, goal: Place, network: Network
) -> None:
    source.store(TOKENS)
    source.store(range(5000, 5016))
    assert goal.move(source, TOKENS, url=network.url).state == "done"
    network.cut()
    assert goal.move(source, range(5000, 5016), url=network.url).state == "done"
