"""The log of operations: each has exactly one end, by its deadline.

No sockets. The log is the one place that gives a request its operation id, its deadline and its
idempotency key. Ended operations stay readable for ``keep_s`` seconds, up to ``keep`` of them.

An operation is queued until the cache process has accepted its request or ``accept_by`` has come,
and running until it ends or ``deadline`` has come::

    queued --accept--> running --finish--> done | partial | failed | cancelled | expired
       \\--refuse, finish, expire--------> failed | cancelled | expired

The first end counts; whatever arrives later changes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Literal, get_args

import msgspec
from blake3 import blake3

from lmcache_kit.controller.moves import with_peer
from lmcache_kit.controller.registry import Process
from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    KitError,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import OperationInfo
from lmcache_kit.interfaces.operations import (
    ListPins,
    Move,
    OperationRequest,
    OperationState,
    OperationStatus,
    Pin,
    Progress,
    Scope,
    kind,
)
from lmcache_kit.protocol.control import MAX_TEXT, StartOperation

logger = logging.getLogger(__name__)

KEEP = 1000
KEEP_S = 3600.0
MAX_ACTIVE = 1000
MAX_WAITING_BYTES = 64 * 1024 * 1024
ACCEPT_S = 10.0
SHORT_S = 10.0
LONG_S = 600.0
_LONG = {"compress", "decompress", "move"}
_MAX_KNOWN = 20
_REFUSALS: dict[str, type[ControlError]] = {
    "failed": OperationFailed,
    "expired": DeadlineExceeded,
}
"""The error of an operation that ended in this state before it was accepted."""


def default_deadline_s(kind: str) -> float:
    """Return the deadline of requests that come without one."""
    return LONG_S if kind in _LONG else SHORT_S


class Operation:
    """One request to one incarnation of a cache process. Only the log changes it.

    ``start`` is the message to send until it is answered, then None. ``answered`` is set with the
    answer, ``ended`` with the end; ``refusal`` is the reason why it was not accepted. The log's
    clock counts ``accept_by`` and ``deadline``.
    """

    def __init__(
        self,
        request: OperationRequest,
        process: Process,
        source: Process | None,
        *,
        deadline_s: float | None,
        idempotency_key: str | None,
        now: float,
        wall: float,
    ) -> None:
        self.operation_id = uuid.uuid4().hex
        self.kind = kind(request)
        self.location = request.location
        self.process = process
        self.source = (
            (request.source, request.source_location) if isinstance(request, Move) else None
        )
        self.idempotency_key = idempotency_key
        self.fingerprint = b""
        if idempotency_key is not None:
            self.fingerprint = _fingerprint(process.instance_id, request, deadline_s)
        self.deadline_s = deadline_s or default_deadline_s(self.kind)
        self.start: StartOperation | None = StartOperation(
            self.operation_id, self.deadline_s, _completed(request, self, source)
        )
        self.accept_by = now + min(ACCEPT_S, self.deadline_s)
        self.deadline = now + self.deadline_s
        self.created = wall
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.ended_on_clock = 0.0
        self.status = OperationStatus("queued")
        self.refusal: KitError | None = None
        self.cancelling = False
        self.sent_at = 0.0
        self.answered = asyncio.Event()
        self.ended = asyncio.Event()

    def __str__(self) -> str:
        """Say what it does and where."""
        place = f"{self.process.instance_id!r}/{self.location!r:.100}"
        if self.source is None:
            return f"{self.kind} at {place}"
        instance_id, location = self.source
        return f"{self.kind} from {instance_id!r}/{location!r:.100} to {place}"

    @property
    def listed(self) -> bool:
        """Whether operators see it; listing pins is not an operation to them."""
        return self.kind != ListPins.__struct_config__.tag

    @property
    def due(self) -> float:
        """When it expires unless something comes first, on the log's clock."""
        return self.accept_by if self.status.state == "queued" else self.deadline

    @property
    def waiting_bytes(self) -> int:
        return len(self.start.request.tokens or b"") if self.start else 0

    async def accepted(self) -> None:
        """Wait for the answer of the cache process. Raise the refusal."""
        await self.answered.wait()
        if self.refusal is not None:
            raise self.refusal

    def info(self) -> OperationInfo:
        """Return its status and identity for frontends."""
        return OperationInfo(
            **msgspec.structs.asdict(self.status),
            operation_id=self.operation_id,
            kind=self.kind,
            instance_id=self.process.instance_id,
            location=self.location,
            worker_ids=tuple(sorted(worker.rank for worker in self.process.registration.workers)),
            created=self.created,
            deadline=self.created + self.deadline_s,
            started_at=self.started_at,
            ended_at=self.ended_at,
            idempotency_key=self.idempotency_key,
            source=self.source,
        )


class OperationLog:
    """All operations. ``clock`` is monotonic; ``wall`` is in seconds since the epoch.

    ``counts`` receives ``operations_total`` and one total per final state.
    """

    def __init__(
        self,
        counts: Counter[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        keep: int = KEEP,
        keep_s: float = KEEP_S,
        max_active: int = MAX_ACTIVE,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._counts = counts
        self._clock = clock
        self._wall = wall
        self._keep = keep
        self._keep_s = keep_s
        self._max_active = max_active
        self._max_waiting_bytes = max_waiting_bytes
        self._operations: dict[str, Operation] = {}
        self._active: dict[str, Operation] = {}
        self._ended: dict[str, Operation] = {}
        self._keys: dict[str, Operation] = {}
        for state in get_args(OperationState):
            if OperationStatus(state).ended:
                counts[f"operations_{state}_total"] += 0

    def open(
        self,
        request: OperationRequest,
        process: Process,
        source: Process | None = None,
        *,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked_by: str = "",
    ) -> Operation:
        """Log a new operation. Raise ControlError when too many are under way.

        The begin and the end of a listed one are told at INFO, and that ``asked_by`` asked for it.
        """
        operation = Operation(
            request,
            process,
            source,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            now=self._clock(),
            wall=self._wall(),
        )
        waiting = sum(each.waiting_bytes for each in self._active.values())
        if len(self._active) >= self._max_active or (
            waiting + operation.waiting_bytes > self._max_waiting_bytes
        ):
            raise ControlError(
                f"{len(self._active)} operations are under way", hint="Wait for some of them to end"
            )
        self._active[operation.operation_id] = operation
        if operation.listed:
            self._operations[operation.operation_id] = operation
            self._counts["operations_total"] += 1
            if idempotency_key is not None:
                self._keys[idempotency_key] = operation
            logger.info("event %s begins: %s%s", operation.operation_id, operation, by(asked_by))
        return operation

    def same(
        self,
        idempotency_key: str | None,
        instance_id: str,
        request: OperationRequest,
        deadline_s: float | None = None,
    ) -> Operation | None:
        """Return the operation that an idempotency key stands for.

        Raise ControlError when the key came with another request.
        """
        operation = self._keys.get(idempotency_key) if idempotency_key is not None else None
        if operation is None:
            return None
        if operation.fingerprint != _fingerprint(instance_id, request, deadline_s):
            raise ControlError(
                f"idempotency_key {idempotency_key!r:.100} stands for another operation: "
                f"event {operation.operation_id}",
                hint="Use a new key for a new operation",
            )
        return operation

    def find(self, operation_id: str) -> Operation:
        """Return an operation. Raise UnknownName, which lists the latest ones."""
        operation = self._operations.get(operation_id)
        if operation is None:
            latest = itertools.islice(reversed(self._operations), _MAX_KNOWN)
            raise UnknownName("event", operation_id, list(latest))
        return operation

    def active(self, operation_id: str) -> Operation | None:
        """Return an operation that has not ended, even one that is not listed."""
        return self._active.get(operation_id)

    def all_active(self) -> list[Operation]:
        """Return all that have not ended, the oldest first."""
        return list(self._active.values())

    def all(self) -> list[Operation]:
        """Return all that are listed, the latest first."""
        return list(reversed(self._operations.values()))

    def accept(self, operation: Operation, scope: Scope) -> None:
        """Log that the cache process has accepted the request."""
        if operation.status.state != "queued":
            return
        operation.status = OperationStatus("running", scope.tokens, Progress(chunks=scope.chunks))
        operation.started_at = self._wall()
        operation.start = None
        operation.answered.set()

    def progress(self, operation: Operation, progress: Progress) -> None:
        """Log the progress of a running operation."""
        if operation.status.state == "running":
            operation.status = msgspec.structs.replace(operation.status, progress=progress)

    def refuse(self, operation: Operation, error: KitError) -> None:
        """Log that the cache process has refused the request. Its key may be used again."""
        self._free_key(operation)
        self._end_without_report(operation, "failed", error)

    def fail(self, operation: Operation, error: KitError) -> None:
        """Log the end of an operation that no cache process will report."""
        if operation.status.state == "queued":
            self.refuse(operation, error)
        else:
            self._end_without_report(operation, "failed", error)

    def finish(self, operation: Operation, status: OperationStatus) -> None:
        """Log the end that the cache process reports."""
        if operation.operation_id not in self._active:
            return
        if operation.status.state == "queued" and status.state in _REFUSALS:
            operation.refusal = _REFUSALS[status.state](
                f"event {operation.operation_id}: {status.message[:MAX_TEXT] or status.state}"
            )
            self._free_key(operation)
        if operation.listed:
            status = msgspec.structs.replace(status, pins=())
        self._end(operation, status)

    def expire(self) -> list[Operation]:
        """End and return the operations whose deadline has come, and forget old ones."""
        now = self._clock()
        late = [operation for operation in self._active.values() if now >= operation.due]
        for operation in late:
            self._end_without_report(operation, "expired", _too_late(operation))
        for operation in list(self._ended.values()):
            if len(self._ended) <= self._keep and now - operation.ended_on_clock < self._keep_s:
                break
            self._forget(operation)
        return late

    def _free_key(self, operation: Operation) -> None:
        """Nothing was done, so that another try with this key is a new operation."""
        if operation.idempotency_key is not None:
            self._keys.pop(operation.idempotency_key, None)

    def _end_without_report(
        self, operation: Operation, state: Literal["failed", "expired"], error: KitError
    ) -> None:
        if operation.operation_id in self._active:
            if operation.status.state == "queued":
                operation.refusal = error
            status = msgspec.structs.replace(
                operation.status, state=state, tokens=0, message=error.message
            )
            self._end(operation, status)

    def _end(self, operation: Operation, status: OperationStatus) -> None:
        del self._active[operation.operation_id]
        operation.status = msgspec.structs.replace(status, message=status.message[:MAX_TEXT])
        operation.ended_at = self._wall()
        operation.ended_on_clock = self._clock()
        operation.start = None
        operation.answered.set()
        operation.ended.set()
        if operation.listed:
            self._ended[operation.operation_id] = operation
            self._counts[f"operations_{status.state}_total"] += 1
            logger.info(
                "event %s has ended: %s is %s after %.1f s, %d tokens%s",
                operation.operation_id,
                operation,
                status.state,
                operation.ended_at - operation.created,
                status.tokens,
                f": {operation.status.message!r}" if status.message else "",
            )

    def _forget(self, operation: Operation) -> None:
        del self._ended[operation.operation_id], self._operations[operation.operation_id]
        key = operation.idempotency_key
        if key is not None and self._keys.get(key) is operation:
            del self._keys[key]


def by(asked_by: str) -> str:
    """Return who asked for an operation, to end a line of the log."""
    return f", asked for by {asked_by!r:.100}" if asked_by else ""


def _too_late(operation: Operation) -> DeadlineExceeded:
    did, within_s = "finish", operation.deadline_s
    if operation.status.state == "queued":
        did, within_s = "accept", min(ACCEPT_S, operation.deadline_s)
    return DeadlineExceeded(
        f"instance {operation.process.instance_id!r} did not {did} {operation.kind!r} "
        f"within {within_s:g} s (event {operation.operation_id})",
        hint="Its cache process is busy, stuck or cut off",
    )


def _completed(
    request: OperationRequest, operation: Operation, source: Process | None
) -> OperationRequest:
    """Give a pin without a name the id of its operation, and a move the access to its source."""
    if isinstance(request, Move) and source is not None:
        return with_peer(request, operation.operation_id, operation.process, source)
    if isinstance(request, Pin) and not request.pin_id:
        return msgspec.structs.replace(request, pin_id=operation.operation_id)
    return request


def _fingerprint(instance_id: str, request: OperationRequest, deadline_s: float | None) -> bytes:
    """Hash a request and where it goes; equal for equal ones."""
    return blake3(msgspec.msgpack.encode((instance_id, request, deadline_s))).digest()
