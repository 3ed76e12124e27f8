"""A controller that answers frontends as a test asks it to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from lmcache_kit.errors import UnknownName
from lmcache_kit.interfaces.frontend import (
    InstanceMatch,
    LocationMatch,
    LookupAnswer,
    LookupQuery,
    OperationInfo,
    PinList,
    WorkerInfo,
)
from lmcache_kit.interfaces.operations import OperationRequest, Progress
from lmcache_kit.metrics import MetricSet, counter

INSTANCE, LOCATION, LOOKUP, OPERATION = "here", "LocalCPUBackend", "lookup-1", "event-1"


class FakeController:
    """A :class:`~lmcache_kit.interfaces.ControllerAPI` with one healthy instance, ``"here"``.

    The instance holds every token. ``asked`` has the names of the methods that were called, and
    ``requests`` the requests of operations. ``failure`` is raised by all methods instead of an
    answer. While ``open`` is not set, no async method answers.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.requests: list[OperationRequest] = []
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.instances = FakeInstances(self)
        self.operations = FakeOperations(self)
        self.metrics = MetricSet(
            "controller",
            "controller_",
            (counter("lookups_total", "requests", "Lookups answered."),),
        )

    def counters(self) -> Mapping[str, float]:
        self.note("counters")
        return {"lookups_total": 1.0}

    def note(self, name: str) -> None:
        """Note a call, and raise ``failure``."""
        self.asked.append(name)
        if self.failure is not None:
            raise self.failure

    async def enter(self, name: str) -> None:
        """Note a call, raise ``failure``, and wait for ``open``."""
        self.note(name)
        await self.open.wait()


class FakeInstances:
    """The half of a :class:`FakeController` for instances."""

    def __init__(self, controller: FakeController) -> None:
        self._controller = controller

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        self._controller.note("lookup")
        check_instance(query.instance_id)
        here = InstanceMatch(INSTANCE, (LocationMatch(LOCATION, len(query.tokens), "end"),))
        return LookupAnswer(LOOKUP, (here,) if query.tokens else ())

    async def health(self, instance_id: str) -> dict[int, int]:
        await self._controller.enter("health")
        check_instance(instance_id)
        return {0: 0}

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        self._controller.note("workers")
        check_instance(instance_id)
        return [WorkerInfo(INSTANCE, 0, "127.0.0.1", 5555, None, 1e9, 1e9, alive=True)]

    async def at_address(self, address: str) -> tuple[str, ...]:
        await self._controller.enter("at_address")
        return (INSTANCE,) if address == "127.0.0.1" else ()


class FakeOperations:
    """The half of a :class:`FakeController` for operations: one, which is done."""

    def __init__(self, controller: FakeController) -> None:
        self._controller = controller

    async def start(
        self,
        instance_id: str,
        request: OperationRequest,
        *,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked_by: str = "",
    ) -> OperationInfo:
        await self._controller.enter("start")
        self._controller.requests.append(request)
        return _info()

    async def wait(self, operation_id: str) -> OperationInfo:
        await self._controller.enter("wait")
        return _info(operation_id)

    async def cancel(self, operation_id: str, *, asked_by: str = "") -> OperationInfo:
        await self._controller.enter("cancel")
        return msgspec.structs.replace(_info(operation_id), state="cancelled")

    def get(self, operation_id: str) -> OperationInfo:
        self._controller.note("get")
        return _info(operation_id)

    def all(self) -> list[OperationInfo]:
        self._controller.note("all")
        return [_info()]

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        await self._controller.enter("pins")
        check_instance(instance_id)
        return PinList(())


def check_instance(instance_id: str | None) -> None:
    """Raise UnknownName for any instance but the one that there is."""
    if instance_id not in (None, INSTANCE):
        raise UnknownName("instance", instance_id, [INSTANCE])


def _info(operation_id: str = OPERATION) -> OperationInfo:
    if operation_id != OPERATION:
        raise UnknownName("event", operation_id, [OPERATION])
    return OperationInfo(
        "done",
        12,
        Progress(1, 1),
        operation_id=OPERATION,
        kind="clear",
        instance_id=INSTANCE,
        location=LOCATION,
        worker_ids=(0,),
        created=1e9,
        deadline=1e9 + 60,
        started_at=1e9,
        ended_at=1e9,
    )
