"""Fakes around the control plane: a tier, an executor and a listener."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

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


class FakeTier:
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


class AheadClock:
    """The monotonic clock, ahead by as many seconds as a test says."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


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
