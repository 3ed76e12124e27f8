"""What was ordered, how far it has come, and how it ended: each event in exactly one way, by its
deadline.

No sockets. Finished events stay readable for ``keep_s`` seconds, up to ``keep`` of them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import get_args

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
from lmcache_kit.interfaces.frontend import EventInfo, EventPart, EventState, Operation
from lmcache_kit.interfaces.operations import (
    Accepted,
    ListPins,
    Move,
    Order,
    Outcome,
    Pin,
    PinInfo,
    Progress,
)
from lmcache_kit.protocol.control import MAX_TEXT, Begin

KEEP = 1000
KEEP_S = 3600.0
MAX_ACTIVE = 1000
MAX_WAITING_BYTES = 64 * 1024 * 1024
TAKE_S = 10.0
QUICK_S = 10.0
LONG_S = 600.0
_LONG = {"compress", "decompress", "move"}
_MAX_KNOWN = 20
_UNDONE: dict[str, type[ControlError]] = {"failed": OperationFailed, "expired": DeadlineExceeded}
"""How an order that ended so before it was accepted is refused."""


def default_deadline_s(operation: str) -> float:
    """For orders that come without one."""
    return LONG_S if operation in _LONG else QUICK_S


class Event:
    """One order given to one life of a cache process. Only the ledger changes it. ``source``: that
    which a move takes from.

    ``begin`` is there until the order was answered. ``answered`` and ``ended`` are set once that
    is so; ``refusal`` is why it never began. On the ledger's clock it is to be taken on by
    ``take_by``, and has ended by ``deadline``.
    """

    def __init__(
        self,
        operation: Operation,
        process: Process,
        source: Process | None = None,
        *,
        now: float,
        wall: float,
    ) -> None:
        order = operation.order
        self.event_id = uuid.uuid4().hex
        self.operation = str(type(order).__struct_config__.tag)
        self.location = order.location
        self.process = process
        self.source = (order.source, order.source_location) if isinstance(order, Move) else None
        self.idempotency_key = operation.idempotency_key
        self.fingerprint = _fingerprint(operation) if operation.idempotency_key else b""
        self.deadline_s = operation.deadline_s or default_deadline_s(self.operation)
        self.begin: Begin | None = Begin(
            self.event_id, self.deadline_s, _filled_in(order, self, source)
        )
        self.take_by = now + min(TAKE_S, self.deadline_s)
        self.deadline = now + self.deadline_s
        self.created = wall
        self.ends_by = wall + self.deadline_s
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.ended_on_clock = 0.0
        self.state: EventState = "queued"
        self.tokens = 0
        self.progress = Progress()
        self.message = ""
        self.pins: tuple[PinInfo, ...] = ()
        self.refusal: KitError | None = None
        self.cancelling = False
        self.said = 0.0
        self.answered = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def listed(self) -> bool:
        """Whether it is an event that people see; asking for pins is none."""
        return self.operation != ListPins.__struct_config__.tag

    @property
    def due(self) -> float:
        """It expires here, on the ledger's clock, unless something comes first."""
        return self.take_by if self.state == "queued" else self.deadline

    @property
    def waiting_bytes(self) -> int:
        return len(self.begin.order.tokens or b"") if self.begin else 0

    def info(self) -> EventInfo:
        """What is known of it now."""
        before, after = self.progress.bytes_before, self.progress.bytes_after
        changed = before and after and self.source is None
        part = EventPart(
            self.process.instance_id,
            self.location,
            tuple(sorted(worker.rank for worker in self.process.said.workers)),
            self.progress,
        )
        return EventInfo(
            event_id=self.event_id,
            operation=self.operation,
            instance_id=self.process.instance_id,
            location=self.location,
            state=self.state,
            tokens=self.tokens,
            parts=(part,),
            ratio=before / after if changed else None,
            message=self.message,
            created=self.created,
            started=self.started_at,
            ended=self.ended_at,
            deadline=self.ends_by,
            idempotency_key=self.idempotency_key,
            source=self.source,
        )


class OperationLog:
    """All events. ``clock`` is monotonic and ``wall`` is seconds since the epoch; ``counts`` takes
    ``operations_total`` and one total for each final state."""

    def __init__(
        self,
        counts: Counter[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        keep: int = KEEP,
        keep_s: float = KEEP_S,
        max_active: int = MAX_ACTIVE,
    ) -> None:
        self._counts = counts
        self._clock = clock
        self._wall = wall
        self._keep = keep
        self._keep_s = keep_s
        self._max_active = max_active
        self._events: dict[str, Event] = {}
        self._active: dict[str, Event] = {}
        self._finished: dict[str, Event] = {}
        self._keys: dict[str, Event] = {}
        for state in get_args(EventState):
            if state not in ("queued", "running"):
                counts[f"operations_{state}_total"] += 0

    def open(self, operation: Operation, process: Process, source: Process | None = None) -> Event:
        """A new event. Raises ControlError when too much is under way."""
        event = Event(operation, process, source, now=self._clock(), wall=self._wall())
        waiting = sum(each.waiting_bytes for each in self._active.values())
        if len(self._active) >= self._max_active or (
            waiting + event.waiting_bytes > MAX_WAITING_BYTES
        ):
            raise ControlError(
                f"{len(self._active)} operations are under way", hint="Wait for some of them to end"
            )
        self._active[event.event_id] = event
        if event.listed:
            self._events[event.event_id] = event
            self._counts["operations_total"] += 1
            if event.idempotency_key is not None:
                self._keys[event.idempotency_key] = event
        return event

    def same(self, operation: Operation) -> Event | None:
        """The event that this operation's idempotency key stands for.

        Raises ControlError when that was another operation.
        """
        if operation.idempotency_key is None:
            return None
        event = self._keys.get(operation.idempotency_key)
        if event is not None and event.fingerprint != _fingerprint(operation):
            raise ControlError(
                f"idempotency_key {operation.idempotency_key!r:.100} stands for another operation: "
                f"event {event.event_id}",
                hint="Use a new key for a new operation",
            )
        return event

    def find(self, event_id: str) -> Event:
        """Raises UnknownName, listing the latest ones."""
        event = self._events.get(event_id)
        if event is None:
            latest = itertools.islice(reversed(self._events), _MAX_KNOWN)
            raise UnknownName("event", event_id, list(latest))
        return event

    def active(self, event_id: str) -> Event | None:
        """One that has not ended, also if it is not listed."""
        return self._active.get(event_id)

    def all_active(self) -> list[Event]:
        """Those that have not ended, in the order they came."""
        return list(self._active.values())

    def all(self) -> list[Event]:
        """All that people see, the latest first."""
        return list(reversed(self._events.values()))

    def accept(self, event: Event, accepted: Accepted) -> None:
        """The cache process has taken it on."""
        if event.state != "queued":
            return
        event.state = "running"
        event.tokens = accepted.tokens
        event.progress = Progress(chunks=accepted.chunks)
        event.started_at = self._wall()
        event.begin = None
        event.answered.set()

    def refuse(self, event: Event, error: KitError) -> None:
        """It was not begun."""
        self._free_key(event)
        self._end_untold(event, "failed", error)

    def fail(self, event: Event, error: KitError) -> None:
        """Nobody will tell how it ended."""
        if event.state == "queued":
            self.refuse(event, error)
        else:
            self._end_untold(event, "failed", error)

    def finish(self, event: Event, outcome: Outcome) -> None:
        """It has ended; only the first end counts."""
        if event.event_id in self._active:
            if event.state == "queued" and outcome.state in _UNDONE:
                event.refusal = _UNDONE[outcome.state](
                    f"event {event.event_id}: {outcome.message[:MAX_TEXT] or outcome.state}"
                )
                self._free_key(event)
            event.tokens = outcome.tokens
            event.progress = outcome.progress
            event.pins = () if event.listed else outcome.pins
            self._end(event, outcome.state, outcome.message)

    def expire(self) -> list[Event]:
        """End what has come to its deadline, and forget old ones. Returns the former."""
        now = self._clock()
        late = [event for event in self._active.values() if now >= event.due]
        for event in late:
            self._end_untold(event, "expired", _too_late(event))
        for event in list(self._finished.values()):
            if len(self._finished) <= self._keep and now - event.ended_on_clock < self._keep_s:
                break
            self._forget(event)
        return late

    def _free_key(self, event: Event) -> None:
        """Nothing was done, so that another try is one."""
        if event.idempotency_key is not None:
            self._keys.pop(event.idempotency_key, None)

    def _end_untold(self, event: Event, state: EventState, error: KitError) -> None:
        if event.event_id in self._active:
            event.tokens = 0
            event.refusal = error if event.state == "queued" else None
            self._end(event, state, error.message)

    def _end(self, event: Event, state: EventState, message: str) -> None:
        del self._active[event.event_id]
        event.state = state
        event.message = message[:MAX_TEXT]
        event.ended_at = self._wall()
        event.ended_on_clock = self._clock()
        event.begin = None
        event.answered.set()
        event.ended.set()
        if event.listed:
            self._finished[event.event_id] = event
            self._counts[f"operations_{state}_total"] += 1

    def _forget(self, event: Event) -> None:
        del self._finished[event.event_id], self._events[event.event_id]
        key = event.idempotency_key
        if key is not None and self._keys.get(key) is event:
            del self._keys[key]


def _too_late(event: Event) -> DeadlineExceeded:
    did, within_s = "finish", event.deadline_s
    if event.state == "queued":
        did, within_s = "take on", min(TAKE_S, event.deadline_s)
    return DeadlineExceeded(
        f"instance {event.process.instance_id!r} did not {did} {event.operation!r} "
        f"within {within_s:g} s (event {event.event_id})",
        hint="Its cache process is busy, stuck or cut off",
    )


def _filled_in(order: Order, event: Event, source: Process | None) -> Order:
    """A pin without a name gets the event's, a move what it needs of its source."""
    if isinstance(order, Move) and source is not None:
        return with_peer(order, event.event_id, event.process, source)
    if isinstance(order, Pin) and not order.pin_id:
        return msgspec.structs.replace(order, pin_id=event.event_id)
    return order


def _fingerprint(operation: Operation) -> bytes:
    """Equal for equal operations."""
    return blake3(msgspec.msgpack.encode(operation)).digest()
