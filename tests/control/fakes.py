"""Fakes around the control plane: a tier, a clock, a network proxy and an executor."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from lmcache_kit.cache.records import ChangeListener, StoredChunk
from lmcache_kit.interfaces.operations import (
    OperationListener,
    OperationRequest,
    OperationStatus,
    Progress,
    Scope,
)
from lmcache_kit.keys import ChunkKey, Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout

LOCATION = "LocalCPUBackend"
LAYOUT = KVLayout("bfloat16", layers=2, kv_heads=2, head_dim=64)
NAMESPACE = Namespace("some/model", LAYOUT, chunk_size=4)


def chunks_of(tokens: Sequence[int], namespace: Namespace = NAMESPACE) -> list[StoredChunk]:
    """Return the chunks that a prompt is stored as."""
    size = namespace.chunk_size
    return [
        StoredChunk(
            chunk.key, chunk.parent, chunk.end - chunk.start, chunk.end - chunk.start < size
        )
        for chunk in chain(namespace.digest, pack_tokens(tokens), size)
    ]


class FakeEngine:
    """The part of a tier that the agent uses."""

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
        """Add chunks, and tell listeners of new ones."""
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
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def eventually(is_true: Callable[[], object], within_s: float = 15.0) -> None:
    """Wait until a condition holds, or fail."""
    ends = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < ends, f"did not happen within {within_s} s"
        time.sleep(0.01)


class Proxy:
    """A way to a local port. Tests cut it: connections end, and new ones work again."""

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


class RunningFake:
    """An operation that goes on until a test ends it through its listener."""

    def __init__(self, request: OperationRequest, listener: OperationListener) -> None:
        self.request = request
        self.listener = listener
        self.cancelled = threading.Event()
        self.muted = False

    def accept(self, tokens: int, chunks: int) -> None:
        self.listener.accepted(Scope(tokens, chunks))

    def progress(self, *fields: int) -> None:
        self.listener.progressed(Progress(*fields))

    def end(self, status: OperationStatus) -> None:
        self.listener.ended(status)

    def cancel(self) -> None:
        self.cancelled.set()
        if not self.muted:
            self.end(OperationStatus("cancelled", message="as asked"))


class FakeExecutor:
    """Accepts every request for 12 tokens in 3 chunks.

    ``scope`` is None for operations that tests accept later. ``at_once`` ends operations when they
    start. ``refusal`` is raised instead.
    """

    def __init__(self) -> None:
        self.running: list[RunningFake] = []
        self.deadlines: list[float] = []
        self.scope: Scope | None = Scope(12, 3)
        self.at_once: OperationStatus | None = None
        self.refusal: Exception | None = None

    def start(
        self, request: OperationRequest, *, deadline_s: float, listener: OperationListener
    ) -> RunningFake:
        if self.refusal is not None:
            raise self.refusal
        self.deadlines.append(deadline_s)
        operation = RunningFake(request, listener)
        self.running.append(operation)
        if self.scope is not None:
            listener.accepted(self.scope)
        if self.at_once is not None:
            listener.ended(self.at_once)
        return operation


class RecordingListener:
    """Records the course of one operation."""

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.progress: list[Progress] = []
        self.statuses: list[OperationStatus] = []
        self._ended = threading.Event()

    def accepted(self, scope: Scope) -> None:
        assert self.scope is None, "it was accepted twice"
        self.scope = scope

    def progressed(self, progress: Progress) -> None:
        self.progress.append(progress)

    def ended(self, status: OperationStatus) -> None:
        assert status.ended
        self.statuses.append(status)
        self._ended.set()

    def wait(self, within_s: float = 20.0) -> OperationStatus:
        """Return the one end of the operation."""
        assert self._ended.wait(within_s), "the operation did not end"
        [status] = self.statuses
        return status
