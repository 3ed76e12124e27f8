"""A cache engine that only remembers, a clock that tests move, and chunks to store."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from lmcache_kit.cache.records import ChangeListener, StoredChunk
from lmcache_kit.interfaces.operations import Accepted, Order, Outcome, Progress
from lmcache_kit.keys import ChunkKey, Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout

LOCATION = "LocalCPUBackend"
LAYOUT = KVLayout("bfloat16", layers=2, kv_heads=2, head_dim=64)
Report: TypeAlias = Callable[[Progress], None]
Finish: TypeAlias = Callable[[Outcome], None]
NAMESPACE = Namespace("some/model", LAYOUT, chunk_size=4)


def chunks_of(tokens: Sequence[int], namespace: Namespace = NAMESPACE) -> list[StoredChunk]:
    """The chunks that a prompt is stored as."""
    size = namespace.chunk_size
    return [
        StoredChunk(
            chunk.key, chunk.parent, chunk.end - chunk.start, chunk.end - chunk.start < size
        )
        for chunk in chain(namespace.digest, pack_tokens(tokens), size)
    ]


class FakeEngine:
    """What the agent needs of a cache engine, and no more."""

    def __init__(self, location: str = LOCATION) -> None:
        self.location = location
        self.chunks: dict[ChunkKey, StoredChunk] = {}
        self.listeners: list[ChangeListener] = []
        self.snapshots = 0
        self.lock = threading.RLock()

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]:
        with self.lock:
            self.listeners.append(listener)
            return list(self.chunks.values())

    def unsubscribe(self, listener: ChangeListener) -> None:
        with self.lock:
            self.listeners.remove(listener)

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None:
        with self.lock:
            self.snapshots += 1
            receive(list(self.chunks.values()))

    def store(self, chunks: Sequence[StoredChunk]) -> None:
        """All ranks have stored these."""
        with self.lock:
            for chunk in chunks:
                if chunk.key not in self.chunks:
                    self.chunks[chunk.key] = chunk
                    for listener in self.listeners:
                        listener.added(chunk)

    def evict(self, keys: Sequence[ChunkKey]) -> None:
        with self.lock:
            for key in keys:
                if self.chunks.pop(key, None):
                    for listener in self.listeners:
                        listener.removed(key)


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def eventually(is_true: Callable[[], object], within_s: float = 15.0) -> None:
    """Wait until something holds; fail when it does not come to."""
    ends = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < ends, f"did not happen within {within_s} s"
        time.sleep(0.01)


class Proxy:
    """A way to a local port that tests can cut: connections end, new ones work again."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()
        self._listener.close()
        for each in self._open:
            each.close()

    def cut(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    near.shutdown(socket.SHUT_RDWR)
                    continue
                self._open.append(far)
                for pair in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._copy, args=pair)
                    self._threads.append(thread)
                    thread.start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


class FakeJob:
    """An order that goes on until a test says how it ends."""

    def __init__(
        self, order: Order, accepted: Accepted | None, report: Report, finish: Finish
    ) -> None:
        self.order = order
        self.accepted = accepted
        self.report = report
        self.finish = finish
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()
        self.finish(Outcome("cancelled", message="as asked"))


class FakeOperator:
    """Takes every order on for 12 tokens in 3 chunks. ``accepts``: None for orders of which that is
    not known yet. ``at_once``: how orders end that end at once. ``refusal``: raised instead."""

    def __init__(self) -> None:
        self.jobs: list[FakeJob] = []
        self.deadlines: list[float] = []
        self.accepts: Accepted | None = Accepted(12, 3)
        self.at_once: Outcome | None = None
        self.refusal: Exception | None = None

    def begin(self, order: Order, *, deadline_s: float, report: Report, finish: Finish) -> FakeJob:
        if self.refusal is not None:
            raise self.refusal
        self.deadlines.append(deadline_s)
        job = FakeJob(order, self.accepts, report, finish)
        self.jobs.append(job)
        if self.at_once is not None:
            finish(self.at_once)
        return job
