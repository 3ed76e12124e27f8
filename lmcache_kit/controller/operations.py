"""Operations: the half of the controller that sends requests and follows them to their end.

No sockets: ``send`` takes a message to a connection, or drops it. A request is sent again every
second until it is answered, and so is a cancel. The other end is
:class:`~lmcache_kit.agent.operations.OperationRunner`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from lmcache_kit.controller.commands import Send
from lmcache_kit.controller.moves import check_ends, check_location
from lmcache_kit.controller.operation_log import Operation, OperationLog, by
from lmcache_kit.controller.registry import Connection, Registry
from lmcache_kit.errors import (
    ControlError,
    InvalidQuery,
    KitError,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import InstancePin, OperationInfo, PinList
from lmcache_kit.interfaces.operations import ListPins, Move, OperationRequest
from lmcache_kit.keys import TOKEN_BYTES
from lmcache_kit.protocol.control import (
    CancelOperation,
    OperationAcknowledged,
    OperationEnded,
    OperationProgressed,
    OperationRejected,
    OperationReport,
    OperationStarted,
)

logger = logging.getLogger(__name__)

MAX_TOKENS = 1024 * 1024
RESEND_S = 1.0
CANCEL_S = 2.0
PINS_S = 5.0
_STOPPING = "the controller is stopping"


class Operations:
    """An :class:`~lmcache_kit.interfaces.frontend.OperationsAPI` over a log.

    Belongs to the controller's event loop. ``clock`` is that of the log.
    """

    def __init__(
        self,
        registry: Registry,
        send: Send,
        *,
        log: OperationLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._counts = registry.counts
        self._log = log or OperationLog(registry.counts, clock=clock)
        self._send = send
        self._clock = clock
        self._closed = False

    @property
    def active(self) -> int:
        """Number of operations that have not ended."""
        return len(self._log.all_active())

    # Frontends.

    async def start(
        self,
        instance_id: str,
        request: OperationRequest,
        *,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked_by: str = "",
    ) -> OperationInfo:
        """Submit a request, and wait until the cache process has accepted it."""
        operation = self.submit(
            instance_id,
            request,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            asked_by=asked_by,
        )
        await operation.accepted()
        return operation.info()

    async def wait(self, operation_id: str) -> OperationInfo:
        """Wait for the end of an operation."""
        operation = self._log.find(operation_id)
        await operation.ended.wait()
        return operation.info()

    async def cancel(self, operation_id: str, *, asked_by: str = "") -> OperationInfo:
        """Ask for the end of an operation, and wait a little for it."""
        self._expire()
        operation = self._log.find(operation_id)
        if operation.ended.is_set():
            if operation.status.state == "cancelled":
                return operation.info()
            raise ControlError(f"event {operation_id} has ended: {operation.status.state}")
        logger.info("event %s is to be cancelled%s", operation.operation_id, by(asked_by))
        self.send_cancel(operation)
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_S):
                await operation.ended.wait()
        return operation.info()

    def get(self, operation_id: str) -> OperationInfo:
        """Return one operation."""
        self._expire()
        return self._log.find(operation_id).info()

    def all(self) -> list[OperationInfo]:
        """Return all operations, the latest first."""
        self._expire()
        return [operation.info() for operation in self._log.all()]

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        """Ask all locations at once. A failure of the one instance that was named is raised."""
        if instance_id is not None:
            asked = [self._registry.reachable(instance_id)]
        else:
            asked = [process for process in self._registry.processes() if process.alive]
        known = sorted({name for process in asked for name in process.registration.locations})
        if asked and location is not None and location not in known:
            raise UnknownName("location", location, known)
        listings = [
            self.submit(process.instance_id, ListPins(location=name), deadline_s=PINS_S)
            for process in asked
            for name in process.registration.locations
            if location in (None, name)
        ]
        await asyncio.gather(*[listing.ended.wait() for listing in listings])
        failed = [listing for listing in listings if listing.refusal is not None]
        if instance_id is not None and failed:
            raise failed[0].refusal or OperationFailed(failed[0].status.message)
        return PinList(
            tuple(
                InstancePin(listing.process.instance_id, pin)
                for listing in listings
                for pin in listing.status.pins
            ),
            tuple(dict.fromkeys(listing.process.instance_id for listing in failed)),
        )

    def submit(
        self,
        instance_id: str,
        request: OperationRequest,
        *,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked_by: str = "",
    ) -> Operation:
        """Log a request and send it, without waiting for the answer."""
        self._expire()
        same = self._log.same(idempotency_key, instance_id, request, deadline_s)
        if same is not None:
            return same
        if self._closed:
            raise NoWorker(_STOPPING)
        process, source = self._registry.reachable(instance_id), None
        if isinstance(request, Move):
            source = self._registry.reachable(request.source)
            check_ends(request, source, process)
        else:
            check_location(process, request.location)
        tokens = len(request.tokens or b"") // TOKEN_BYTES
        if tokens > MAX_TOKENS:
            raise InvalidQuery(f"{tokens} tokens are over the {MAX_TOKENS} that a request may name")
        operation = self._log.open(
            request,
            process,
            source,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            asked_by=asked_by,
        )
        self._transmit(operation)
        return operation

    def send_cancel(self, operation: Operation) -> None:
        """Ask the cache process to stop an operation, again and again until it has ended."""
        operation.cancelling = True
        self._transmit(operation)

    # Cache processes.

    def handle(self, connection: Connection, message: OperationReport) -> None:
        """Take a report in. Only the process that received the request may report on it."""
        operation = self._log.active(message.operation_id)
        if operation is not None and self._registry.on(connection) is not operation.process:
            self._counts["results_unasked_total"] += 1
            return
        if isinstance(message, OperationEnded):
            self._send(connection, OperationAcknowledged(message.operation_id))
        if operation is None:
            self._counts["operation_ends_late_total"] += isinstance(message, OperationEnded)
            return
        match message:
            case OperationStarted():
                self._log.accept(operation, message.scope)
            case OperationRejected():
                self._log.refuse(operation, _error(message.cut()))
            case OperationProgressed():
                self._log.progress(operation, message.progress)
            case OperationEnded():
                self._log.finish(operation, message.status)

    # Time.

    def tick(self) -> None:
        """Send again what has no answer, and end operations that no process will report on."""
        self._expire()
        now = self._clock()
        for operation in self._log.all_active():
            if not self._registry.knows(operation.process):
                self._log.fail(operation, _lost(operation))
            elif (operation.start or operation.cancelling) and now - operation.sent_at >= RESEND_S:
                self._counts["operation_messages_resent_total"] += 1
                self._transmit(operation)

    def close(self) -> None:
        """Fail all operations, because the controller stops."""
        self._closed = True
        for operation in self._log.all_active():
            self._log.fail(operation, NoWorker(_STOPPING))

    def _expire(self) -> None:
        """End late operations here and in their cache processes."""
        for operation in self._log.expire():
            self._send(operation.process.connection, CancelOperation(operation.operation_id))

    def _transmit(self, operation: Operation) -> None:
        """Send the request or the cancel of an operation."""
        operation.sent_at = now = self._clock()
        connection = operation.process.connection
        if operation.cancelling:
            self._send(connection, CancelOperation(operation.operation_id))
        elif operation.start is not None:
            # The cache process ends a little earlier, so that its own report comes in time.
            left = operation.deadline - now
            left = max(0.0, left - min(3.0, left / 10))
            self._send(connection, msgspec.structs.replace(operation.start, deadline_s=left))


def _lost(operation: Operation) -> NoWorker:
    return NoWorker(
        f"the cache process of instance {operation.process.instance_id!r} ended before the "
        "operation did",
        hint="What it held is gone with it",
    )


def _error(rejected: OperationRejected) -> KitError:
    """Rebuild the error that the cache process raised."""
    if rejected.reason == "unknown":
        return UnknownName(rejected.kind, rejected.name, list(rejected.known))
    errors = {"invalid": InvalidQuery, "refused": ControlError, "failed": OperationFailed}
    return errors[rejected.reason](rejected.message, hint=rejected.hint)
