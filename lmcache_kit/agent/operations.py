"""The cache process's side of orders: begin each once, and tell how it goes until it is known.

No sockets. The operator's threads only take notes here (their ``report`` and ``finish``); all
else belongs to the agent's thread. The other end is
:class:`~lmcache_kit.controller.operations.Operations`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from lmcache_kit.errors import ControlError, InvalidQuery, KitError, UnknownName
from lmcache_kit.interfaces.operations import Accepted, Job, Operator, Outcome, Progress
from lmcache_kit.protocol.control import (
    MAX_TEXT,
    AboutOrders,
    Began,
    Begin,
    Ended,
    Progressed,
    Rejected,
)

log = logging.getLogger(__name__)

Tell: TypeAlias = Callable[[AboutOrders], bool]
"""False: the connection takes nothing now."""

MAX_JOBS = 256
MAX_PINS = 10_000
PROGRESS_S = 0.1
AGAIN_S = 1.0
KEEP_S = 600.0


@dataclass(slots=True)
class _Entry:
    """One order. ``begin`` is None once it was begun, ``accepted`` until the job knows what it is
    about, ``answer`` once it was told. When its progress and its end were told last is on the
    clock, 0: never on this connection."""

    event_id: str
    begin: Begin | None = None
    accepted: Accepted | None = None
    answer: Began | Rejected | None = None
    job: Job | None = None
    progress: Progress | None = None
    outcome: Outcome | None = None
    progress_told: float = 0.0
    end_told: float = 0.0
    ended: float = 0.0


class Jobs:
    """All orders of one cache process that its controller may not know the end of.

    ``wake`` is called from any thread when there is something to tell.
    """

    def __init__(
        self,
        operator: Operator | None,
        *,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._operator = operator
        self._wake = wake
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    # What the controller says.

    def begin(self, message: Begin) -> None:
        """To be begun at the next turn; one that is known is answered again."""
        entry = self._entries.get(message.event_id)
        if entry is None:
            full = len(self._entries) >= MAX_JOBS
            entry = self._add(_Entry(message.event_id, begin=None if full else message))
            if full:
                busy = ControlError(f"{MAX_JOBS} orders are under way", hint="Wait for them to end")
                entry.answer = _rejection(message.event_id, busy)
        else:
            if entry.accepted is not None:
                entry.answer = Began(message.event_id, entry.accepted)
            entry.end_told = 0.0

    def cancel(self, event_id: str) -> None:
        """Stop it soon; one that was not begun never is."""
        entry = self._entries.get(event_id)
        if entry is None:
            entry = self._add(_Entry(event_id))
        if entry.job is not None:
            entry.job.cancel()
        else:
            entry.begin = None
            self._finish(entry, Outcome("cancelled", message="it had not begun"))

    def settled(self, event_id: str) -> None:
        """Its end is known."""
        entry = self._entries.get(event_id)
        if entry is not None and entry.outcome is not None:
            self._drop(entry)

    # The agent's thread.

    def restart(self) -> None:
        """A new connection: tell every end again at once."""
        for entry in self._entries.values():
            entry.end_told = 0.0

    def wait_s(self) -> float | None:
        """How long until something is due; None when nothing is."""
        now = self._clock()
        with self._lock:
            due = [_due(entry) for entry in self._entries.values()]
        soonest = min((each for each in due if each is not None), default=None)
        return None if soonest is None else max(0.0, soonest - now)

    def turn(self, tell: Tell) -> None:
        """Begin what is to be begun, and tell what is due."""
        now = self._clock()
        for entry in list(self._entries.values()):
            if entry.begin is not None:
                self._start(entry, entry.begin)
            self._look(entry)
            if not self._tell(entry, tell, now):
                return
            if entry.outcome is not None and now - entry.ended > KEEP_S:
                self._drop(entry)

    def stop(self) -> None:
        """Cancel whatever runs."""
        for entry in list(self._entries.values()):
            if entry.job is not None and entry.outcome is None:
                entry.job.cancel()

    def stats(self) -> dict[str, float]:
        """Gauges."""
        with self._lock:
            entries = list(self._entries.values())
        return {
            "orders": float(len(entries)),
            "orders_running": float(sum(entry.outcome is None for entry in entries)),
        }

    def _start(self, entry: _Entry, begin: Begin) -> None:
        entry.begin = None

        def report(progress: Progress) -> None:
            with self._lock:
                entry.progress = progress
            self._wake()

        def finish(outcome: Outcome) -> None:
            self._finish(entry, outcome)
            self._wake()

        try:
            if self._operator is None:
                raise ControlError("this cache process carries out no orders")
            entry.job = self._operator.begin(
                begin.order, deadline_s=begin.deadline_s, report=report, finish=finish
            )
        except KitError as error:
            entry.answer = _rejection(begin.event_id, error).cut()
        except Exception:
            # The boundary to the operator: its defect must not end the agent's thread.
            log.exception("an order could not be begun: %s", begin.event_id)
            message = "the cache process failed to begin it"
            entry.answer = Rejected(begin.event_id, "failed", message, "Its log says why")

    def _look(self, entry: _Entry) -> None:
        """Answer once the job knows what it is about."""
        if entry.job is not None and entry.accepted is None:
            entry.accepted = entry.job.accepted
            if entry.accepted is not None:
                entry.answer = Began(entry.event_id, entry.accepted)

    def _tell(self, entry: _Entry, tell: Tell, now: float) -> bool:
        """False: the connection takes nothing more."""
        if entry.answer is not None:
            if not tell(entry.answer):
                return False
            if isinstance(entry.answer, Rejected):
                self._drop(entry)
                return True
            entry.answer = None
        with self._lock:
            due, outcome, progress = _due(entry), entry.outcome, entry.progress
        if due is None or due > now:
            return True
        if outcome is not None:
            told = tell(Ended(entry.event_id, outcome))
            entry.end_told = now if told else 0.0
            return told
        assert progress is not None
        if not tell(Progressed(entry.event_id, progress)):
            return False
        entry.progress_told = now
        with self._lock:
            if entry.progress is progress:
                entry.progress = None
        return True

    def _finish(self, entry: _Entry, outcome: Outcome) -> None:
        """Only the first end counts."""
        with self._lock:
            if entry.outcome is None:
                entry.outcome = _bounded(outcome)
                entry.ended = self._clock()

    def _add(self, entry: _Entry) -> _Entry:
        with self._lock:
            self._entries[entry.event_id] = entry
        return entry

    def _drop(self, entry: _Entry) -> None:
        with self._lock:
            self._entries.pop(entry.event_id, None)


def _due(entry: _Entry) -> float | None:
    """When something is to be done for it, on the clock; None: nothing."""
    if entry.begin is not None or entry.answer is not None:
        return 0.0
    if entry.outcome is not None:
        return entry.end_told + AGAIN_S if entry.end_told else 0.0
    if entry.progress is not None and entry.accepted is not None:
        return entry.progress_told + PROGRESS_S if entry.progress_told else 0.0
    return None


def _rejection(event_id: str, error: KitError) -> Rejected:
    if isinstance(error, UnknownName):
        known = tuple(error.known)
        return Rejected(event_id, "unknown", error.message, "", error.kind, error.name, known)
    if isinstance(error, InvalidQuery):
        return Rejected(event_id, "invalid", error.message, error.hint)
    return Rejected(event_id, "refused", error.message, error.hint)


def _bounded(outcome: Outcome) -> Outcome:
    """What fits into one frame."""
    more = len(outcome.pins) - MAX_PINS
    if more <= 0:
        return msgspec.structs.replace(outcome, message=outcome.message[:MAX_TEXT])
    return msgspec.structs.replace(
        outcome,
        state="partial",
        pins=outcome.pins[:MAX_PINS],
        message=f"{more} more pins are not listed",
    )
