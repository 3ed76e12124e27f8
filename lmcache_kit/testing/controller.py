"""A controller for frontends to talk to, that does as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from lmcache_kit.errors import UnknownName
from lmcache_kit.interfaces.frontend import (
    EventInfo,
    EventPart,
    InstanceMatch,
    LocationMatch,
    LookupAnswer,
    LookupQuery,
    Operation,
    PinList,
    WorkerInfo,
)
from lmcache_kit.interfaces.operations import Progress

INSTANCE, LOCATION, EVENT = "here", "LocalCPUBackend", "event-1"


class FakeController:
    """One instance, ``"here"``, that is well and holds every token; a
    :class:`~lmcache_kit.interfaces.ControllerAPI`.

    ``asked``: the names of the methods that were called. ``failure``: raised by all of them
    instead of an answer. While ``open`` is not set, no async method answers.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.operations: list[Operation] = []
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        self._note("lookup")
        self._known(query.instance_id)
        here = InstanceMatch(INSTANCE, (LocationMatch(LOCATION, len(query.tokens), "end"),))
        return LookupAnswer(EVENT, (here,) if query.tokens else ())

    async def health(self, instance_id: str) -> dict[int, int]:
        await self._pass("health")
        self._known(instance_id)
        return {0: 0}

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        self._note("workers")
        self._known(instance_id)
        return [WorkerInfo(INSTANCE, 0, "127.0.0.1", 5555, None, 1e9, 1e9, alive=True)]

    def instance_at(self, ip: str) -> str | None:
        self._note("instance_at")
        return INSTANCE if ip == "127.0.0.1" else None

    async def operate(self, operation: Operation) -> EventInfo:
        await self._pass("operate")
        self.operations.append(operation)
        return self._event()

    async def ended(self, event_id: str) -> EventInfo:
        await self._pass("ended")
        return self._event(event_id)

    async def cancel(self, event_id: str) -> EventInfo:
        await self._pass("cancel")
        return msgspec.structs.replace(self._event(event_id), state="cancelled")

    def event(self, event_id: str) -> EventInfo:
        self._note("event")
        return self._event(event_id)

    def events(self) -> list[EventInfo]:
        self._note("events")
        return [self._event()]

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        await self._pass("pins")
        self._known(instance_id)
        return PinList(())

    def counters(self) -> Mapping[str, float]:
        self._note("counters")
        return {"lookups_total": 1.0}

    def _note(self, name: str) -> None:
        self.asked.append(name)
        if self.failure is not None:
            raise self.failure

    async def _pass(self, name: str) -> None:
        self._note(name)
        await self.open.wait()

    def _known(self, instance_id: str | None) -> None:
        if instance_id not in (None, INSTANCE):
            raise UnknownName("instance", instance_id, [INSTANCE])

    def _event(self, event_id: str = EVENT) -> EventInfo:
        if event_id != EVENT:
            raise UnknownName("event", event_id, [EVENT])
        return EventInfo(
            event_id=EVENT,
            operation="clear",
            instance_id=INSTANCE,
            location=LOCATION,
            state="done",
            tokens=12,
            parts=(EventPart(INSTANCE, LOCATION, (0,), Progress(1, 1)),),
            ratio=None,
            message="",
            created=1e9,
            started=1e9,
            ended=1e9,
            deadline=1e9 + 60,
            idempotency_key=None,
        )
