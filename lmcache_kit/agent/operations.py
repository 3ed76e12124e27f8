"""Operations in the cache process: start each once, and report on it until its end is acknowledged.

No sockets. The executor's threads only take notes here (through :class:`_Operation`, which is the
listener of its own operation); all else belongs to the agent's thread. The other end is
:class:`~lmcache_kit.controller.operations.Operations`.

An operation is waiting until the agent's thread hands its request to the executor, then running.
It is answered once it is accepted, rejected or ended. Progress is reported ten times a second at
most. The end is reported every second until it is acknowledged, for ten minutes at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from lmcache_kit.errors import ControlError, InvalidQuery, KitError, UnknownName
from lmcache_kit.interfaces.operations import (
    OperationExecutor,
    OperationStatus,
    Progress,
    RunningOperation,
    Scope,
)
from lmcache_kit.protocol.control import (
    MAX_TEXT,
    CancelOperation,
    OperationAcknowledged,
    OperationCommand,
    OperationEnded,
    OperationProgressed,
    OperationRejected,
    OperationReport,
    OperationStarted,
    StartOperation,
)

log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[OperationReport], bool]
"""Return False when the connection takes nothing now."""

MAX_OPERATIONS = 256
MAX_PINS = 10_000
PROGRESS_S = 0.1
RESEND_S = 1.0
KEEP_S = 600.0


class _Operation:
    """One operation, and what is to be reported on it.

    An :class:`~lmcache_kit.interfaces.operations.OperationListener`: the executor's threads set
    ``scope``, ``progress`` and ``status`` under the lock. The agent's thread owns the rest.
    ``start`` is the request until it is handed over (``started``), ``answer`` the answer until it
    is sent, and ``running`` stays None for an operation that cannot be stopped.
    The times of the last reports are on the clock; 0 stands for none on this connection.
    """

    def __init__(
        self,
        operation_id: str,
        start: StartOperation | None,
        *,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.operation_id = operation_id
        self.start = start
        self.started = False
        self.running: RunningOperation | None = None
        self.scope: Scope | None = None
        self.progress: Progress | None = None
        self.status: OperationStatus | None = None
        self.answer: OperationStarted | OperationRejected | None = None
        self.progress_sent_at = 0.0
        self.end_sent_at = 0.0
        self.ended_at = 0.0
        self._wake = wake
        self._clock = clock
        self._lock = threading.Lock()

    # Any thread.

    def accepted(self, scope: Scope) -> None:
        """Answer the controller."""
        with self._lock:
            self.scope = scope
            self.answer = OperationStarted(self.operation_id, scope)
        self._wake()

    def progressed(self, progress: Progress) -> None:
        """Report soon. Later progress replaces progress that is not sent yet."""
        with self._lock:
            self.progress = progress
        self._wake()

    def ended(self, status: OperationStatus) -> None:
        """Report the end. Only the first one counts."""
        with self._lock:
            if self.status is None:
                self.status = _bounded(status)
                self.ended_at = self._clock()
        self._wake()

    # The agent's thread.

    def repeat(self) -> None:
        """Answer again, and report the end again."""
        with self._lock:
            if self.scope is not None:
                self.answer = OperationStarted(self.operation_id, self.scope)
        self.end_sent_at = 0.0

    def due(self) -> float | None:
        """When something is to be done, on the clock; None for nothing."""
        with self._lock:
            if self.start is not None or self.answer is not None:
                return 0.0
            if self.status is not None:
                return self.end_sent_at + RESEND_S if self.end_sent_at else 0.0
            if self.progress is not None and self.scope is not None:
                return self.progress_sent_at + PROGRESS_S if self.progress_sent_at else 0.0
            return None

    def report(self, send: Send, now: float) -> bool:
        """Send what is due. Return False when the connection takes nothing more."""
        with self._lock:
            answer = self.answer
        if answer is not None:
            if not send(answer):
                return False
            if isinstance(answer, OperationRejected):
                return True
            with self._lock:
                self.answer = None
        due = self.due()
        if due is None or due > now:
            return True
        with self._lock:
            status, progress = self.status, self.progress
        if status is not None:
            sent = send(OperationEnded(self.operation_id, status))
            self.end_sent_at = now if sent else 0.0
            return sent
        assert progress is not None
        if not send(OperationProgressed(self.operation_id, progress)):
            return False
        self.progress_sent_at = now
        with self._lock:
            if self.progress is progress:
                self.progress = None
        return True


class OperationRunner:
    """All operations of a cache process whose end the controller may not know.

    ``wake`` is called from any thread when there is something to report.
    """

    def __init__(
        self,
        executor: OperationExecutor | None,
        *,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        max_operations: int = MAX_OPERATIONS,
    ) -> None:
        self._executor = executor
        self._wake = wake
        self._clock = clock
        self._max_operations = max_operations
        self._operations: dict[str, _Operation] = {}

    def handle(self, message: OperationCommand) -> None:
        """Take in what the controller sends. The next :meth:`turn` acts on it."""
        operation = self._operations.get(message.operation_id)
        match message:
            case StartOperation() if operation is not None:
                operation.repeat()
            case StartOperation() if len(self._operations) >= self._max_operations:
                busy = ControlError(
                    f"{self._max_operations} operations are under way", hint="Wait for them to end"
                )
                self._add(message.operation_id).answer = _rejection(message.operation_id, busy)
            case StartOperation():
                self._add(message.operation_id, message)
            case CancelOperation():
                self._cancel(operation or self._add(message.operation_id))
            case OperationAcknowledged():
                if operation is not None and operation.status is not None:
                    del self._operations[operation.operation_id]

    def restart(self) -> None:
        """Report every end again on a new connection."""
        for operation in self._operations.values():
            operation.end_sent_at = 0.0

    def wait_s(self) -> float | None:
        """Return the time until something is due; None for nothing."""
        due = [operation.due() for operation in self._operations.values()]
        soonest = min((each for each in due if each is not None), default=None)
        return None if soonest is None else max(0.0, soonest - self._clock())

    def turn(self, send: Send) -> None:
        """Start what waits, and report what is due."""
        now = self._clock()
        for operation in list(self._operations.values()):
            if operation.start is not None:
                self._start(operation, operation.start)
            rejected = isinstance(operation.answer, OperationRejected)
            if not operation.report(send, now):
                return
            too_old = operation.status is not None and now - operation.ended_at > KEEP_S
            if rejected or too_old:
                self._operations.pop(operation.operation_id, None)

    def stop(self) -> None:
        """Cancel what runs."""
        for operation in list(self._operations.values()):
            if operation.running is not None and operation.status is None:
                operation.running.cancel()

    def stats(self) -> dict[str, float]:
        """Return gauges. Called from any thread."""
        operations = list(self._operations.values())
        return {
            "operations": float(len(operations)),
            "operations_running": float(sum(each.status is None for each in operations)),
        }

    def _start(self, operation: _Operation, start: StartOperation) -> None:
        operation.start, operation.started = None, True
        try:
            if self._executor is None:
                raise ControlError("this cache process carries out no operations")
            operation.running = self._executor.start(
                start.request, deadline_s=start.deadline_s, listener=operation
            )
        except KitError as error:
            operation.answer = _rejection(start.operation_id, error).cut()
        except Exception:
            # The boundary to the executor: its defect must not end the agent's thread.
            log.exception("an operation could not be started: %s", start.operation_id)
            message = "the cache process failed to start it"
            operation.answer = OperationRejected(
                start.operation_id, "failed", message, "Its log says why"
            )

    def _cancel(self, operation: _Operation) -> None:
        if operation.running is not None:
            operation.running.cancel()
        elif not operation.started:
            operation.start = None
            operation.ended(OperationStatus("cancelled", message="it had not begun"))

    def _add(self, operation_id: str, start: StartOperation | None = None) -> _Operation:
        operation = _Operation(operation_id, start, wake=self._wake, clock=self._clock)
        self._operations[operation_id] = operation
        return operation


def _rejection(operation_id: str, error: KitError) -> OperationRejected:
    if isinstance(error, UnknownName):
        known = tuple(error.known)
        return OperationRejected(
            operation_id, "unknown", error.message, "", error.kind, error.name, known
        )
    if isinstance(error, InvalidQuery):
        return OperationRejected(operation_id, "invalid", error.message, error.hint)
    return OperationRejected(operation_id, "refused", error.message, error.hint)


def _bounded(status: OperationStatus) -> OperationStatus:
    """Cut a status to what fits into one frame."""
    more = len(status.pins) - MAX_PINS
    if more <= 0:
        return msgspec.structs.replace(status, message=status.message[:MAX_TEXT])
    return msgspec.structs.replace(
        status,
        state="partial",
        pins=status.pins[:MAX_PINS],
        message=f"{more} more pins are not listed",
    )
