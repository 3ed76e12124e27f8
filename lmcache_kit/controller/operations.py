"""The controller's side of orders: give each to its cache process until it is answered, and keep
the ledger.

No sockets: ``send`` takes a message to a connection, or drops it. The other end is
:class:`~lmcache_kit.agent.operations.Jobs`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import msgspec

from lmcache_kit.controller.moves import check_ends, check_location
from lmcache_kit.controller.operation_log import Event, OperationLog
from lmcache_kit.controller.registry import Connection, Process, Registry
from lmcache_kit.errors import (
    ControlError,
    InvalidQuery,
    KitError,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import EventInfo, InstancePin, Operation, PinList
from lmcache_kit.interfaces.operations import ListPins, Move
from lmcache_kit.keys import TOKEN_BYTES
from lmcache_kit.protocol.control import (
    AboutOrders,
    Began,
    Cancel,
    Ended,
    FromController,
    Progressed,
    Rejected,
    Settled,
)

Send: TypeAlias = Callable[[Connection, FromController], None]

MAX_TOKENS = 1024 * 1024
AGAIN_S = 1.0
CANCEL_S = 2.0
PINS_S = 5.0
_STOPPING = "the controller is stopping"


class Operations:
    """Belongs to the controller's event loop. ``clock`` is that of the ledger."""

    def __init__(
        self,
        registry: Registry,
        send: Send,
        *,
        ledger: OperationLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._counts = registry.counts
        self._ledger = ledger or OperationLog(registry.counts, clock=clock)
        self._send = send
        self._clock = clock
        self._closed = False

    @property
    def active(self) -> int:
        """How many have not ended."""
        return len(self._ledger.all_active())

    # What frontends ask.

    async def operate(self, operation: Operation) -> EventInfo:
        """See :class:`~lmcache_kit.interfaces.frontend.ControllerAPI`."""
        self._expire()
        event = self._ledger.same(operation)
        if event is None:
            event = self._open(operation, self._reachable(operation.instance_id))
        await event.answered.wait()
        if event.refusal is not None:
            raise event.refusal
        return event.info()

    async def ended(self, event_id: str) -> EventInfo:
        """Wait for the end of an event."""
        event = self._ledger.find(event_id)
        await event.ended.wait()
        return event.info()

    async def cancel(self, event_id: str) -> EventInfo:
        """Ask for the end of an event, and wait a little for it."""
        self._expire()
        event = self._ledger.find(event_id)
        if event.ended.is_set():
            if event.state == "cancelled":
                return event.info()
            raise ControlError(f"event {event_id} has ended: {event.state}")
        event.cancelling = True
        self._say(event)
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_S):
                await event.ended.wait()
        return event.info()

    def event(self, event_id: str) -> EventInfo:
        """One event."""
        self._expire()
        return self._ledger.find(event_id).info()

    def events(self) -> list[EventInfo]:
        """All events, the latest first."""
        self._expire()
        return [event.info() for event in self._ledger.all()]

    async def pins(self, instance_id: str | None, location: str | None) -> PinList:
        """Ask all at once; of many instances those that do not answer are named."""
        if instance_id is not None:
            asked = [self._reachable(instance_id)]
        else:
            asked = [process for process in self._registry.processes() if process.alive]
        known = sorted({name for process in asked for name in process.said.locations})
        if asked and location is not None and location not in known:
            raise UnknownName("location", location, known)
        questions = [
            self._pins_at(process, name)
            for process in asked
            for name in process.said.locations
            if location in (None, name)
        ]
        answers = await asyncio.gather(*questions)
        failed = [event for event in answers if event.refusal is not None]
        if instance_id is not None and failed:
            raise failed[0].refusal or OperationFailed(failed[0].message)
        return PinList(
            tuple(
                InstancePin(event.process.instance_id, pin)
                for event in answers
                for pin in event.pins
            ),
            tuple(dict.fromkeys(event.process.instance_id for event in failed)),
        )

    # What cache processes say.

    def handle(self, connection: Connection, message: AboutOrders) -> None:
        """From a process that has registered. Only the one that was asked may answer."""
        event = self._ledger.active(message.event_id)
        if event is not None and self._registry.on(connection) is not event.process:
            self._counts["results_unasked_total"] += 1
            return
        if isinstance(message, Ended):
            self._send(connection, Settled(message.event_id))
        if event is None:
            self._counts["outcomes_late_total"] += isinstance(message, Ended)
            return
        match message:
            case Began():
                self._ledger.accept(event, message.accepted)
            case Rejected():
                self._ledger.refuse(event, _error(message.cut()))
            case Progressed():
                if event.state == "running":
                    event.progress = message.progress
            case Ended():
                self._ledger.finish(event, message.outcome)

    # Time.

    def tick(self) -> None:
        """Say again what was not answered, and end what nobody will answer."""
        self._expire()
        now = self._clock()
        for event in self._ledger.all_active():
            if not self._registry.knows(event.process):
                self._ledger.fail(event, _lost(event))
            elif (event.begin or event.cancelling) and now - event.said >= AGAIN_S:
                self._counts["orders_repeated_total"] += 1
                self._say(event)

    def close(self) -> None:
        """The controller stops; whoever waits is told."""
        self._closed = True
        for event in self._ledger.all_active():
            self._ledger.fail(event, NoWorker(_STOPPING))

    def _expire(self) -> None:
        """On their side they stop as well, if they have begun."""
        for event in self._ledger.expire():
            self._send(event.process.connection, Cancel(event.event_id))

    def _open(self, operation: Operation, process: Process) -> Event:
        if self._closed:
            raise NoWorker(_STOPPING)
        order, source = operation.order, None
        if isinstance(order, Move):
            source = self._reachable(order.source)
            check_ends(order, source, process)
        else:
            check_location(process, order.location)
        tokens = len(order.tokens or b"") // TOKEN_BYTES
        if tokens > MAX_TOKENS:
            raise InvalidQuery(f"{tokens} tokens are over the {MAX_TOKENS} that an order may name")
        event = self._ledger.open(operation, process, source)
        self._say(event)
        return event

    def _reachable(self, instance_id: str) -> Process:
        """Raises UnknownName, or NoWorker for one that is silent."""
        process = self._registry.find(instance_id)
        if not process.alive:
            raise self._registry.silent(process)
        return process

    async def _pins_at(self, process: Process, location: str) -> Event:
        order = ListPins(location=location)
        event = self._open(
            Operation(instance_id=process.instance_id, order=order, deadline_s=PINS_S), process
        )
        await event.ended.wait()
        return event

    def _say(self, event: Event) -> None:
        """The order, or that it is to stop."""
        event.said = now = self._clock()
        if event.cancelling:
            self._send(event.process.connection, Cancel(event.event_id))
        elif event.begin is not None:
            # A little less, so that its own account of what it did comes in time.
            left = event.deadline - now
            left = max(0.0, left - min(3.0, left / 10))
            self._send(
                event.process.connection, msgspec.structs.replace(event.begin, deadline_s=left)
            )


def _lost(event: Event) -> NoWorker:
    return NoWorker(
        f"the cache process of instance {event.process.instance_id!r} ended before it was done",
        hint="What it held is gone with it",
    )


def _error(said: Rejected) -> KitError:
    """What the cache process raised."""
    if said.why == "unknown":
        return UnknownName(said.kind, said.name, list(said.known))
    kinds = {"invalid": InvalidQuery, "refused": ControlError, "failed": OperationFailed}
    return kinds[said.why](said.message, hint=said.hint)
