"""A controller that answers from what a test puts into it, and the frontend on a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import aiohttp
import msgspec
import pytest
from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions

from lmcache_kit.errors import UnknownName
from lmcache_kit.interfaces import PluginRoute
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
from lmcache_kit.metrics import MetricSet, counter, gauge

TAKEN = OperationInfo(
    "running",
    12,
    Progress(1, 3, 600, 100),
    operation_id="e1",
    kind="compress",
    instance_id="a",
    location="ram",
    worker_ids=(0, 1),
    created=100.0,
    started_at=100.5,
    deadline=700.0,
)
"""An operation that goes on."""


class Submitted(NamedTuple):
    """A request that a frontend submitted."""

    instance_id: str
    request: OperationRequest
    deadline_s: float | None
    idempotency_key: str | None


class FakeController:
    """``matches``: instance id to its locations. ``failure``: raised by whatever is asked.
    ``taken``: how each operation starts. ``end_status``: how it ends, None: never."""

    def __init__(self) -> None:
        self.matches: dict[str, list[tuple[str, int]]] = {}
        self.queries: list[LookupQuery] = []
        self.infos: list[WorkerInfo] = []
        self.worker_queries: list[tuple[str | None, Sequence[int] | None]] = []
        self.codes: dict[int, int] = {0: 0}
        self.failure: Exception | None = None
        self.wait_s = 0.0
        self.asked = asyncio.Event()
        self.values: dict[str, float] = {}
        self.submitted: list[Submitted] = []
        self.callers: list[str] = []
        self.taken = TAKEN
        self.end_status: OperationInfo | None = None
        self.known: list[OperationInfo] = []
        self.pinned = PinList(())
        self.pin_queries: list[tuple[str | None, str | None]] = []

    metrics = MetricSet(
        "controller",
        "controller_",
        (counter("lookups_total", "requests", "Lookups."), gauge("keys", "keys", "Keys.")),
    )

    @property
    def instances(self) -> FakeController:
        """Both halves are this object."""
        return self

    operations = instances

    @property
    def requests(self) -> list[OperationRequest]:
        """The requests that were submitted."""
        return [each.request for each in self.submitted]

    def end(self, **changes: object) -> None:
        """Operations end with these fields."""
        self.end_status = msgspec.structs.replace(
            self.taken, **{"state": "done", "message": "", **changes}
        )

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        self._fail()
        self.queries.append(query)
        found = [
            InstanceMatch(name, tuple(LocationMatch(where, n, "missing") for where, n in at))
            for name, at in self.matches.items()
        ]
        return LookupAnswer("event-1", tuple(found))

    async def health(self, instance_id: str) -> dict[int, int]:
        self._fail()
        if instance_id not in self.matches:
            raise UnknownName("instance", instance_id, list(self.matches))
        self.asked.set()
        await asyncio.sleep(self.wait_s)
        return self.codes

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        self._fail()
        self.worker_queries.append((instance_id, worker_ids))
        return self.infos

    async def at_address(self, address: str) -> tuple[str, ...]:
        self._fail()
        return {"10.0.0.7": ("here",), "gpu-1": ("b", "a")}.get(address, ())

    async def start(
        self,
        instance_id: str,
        request: OperationRequest,
        *,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked_by: str = "",
    ) -> OperationInfo:
        self._fail()
        self.callers.append(asked_by)
        self.submitted.append(Submitted(instance_id, request, deadline_s, idempotency_key))
        return self.taken

    async def wait(self, operation_id: str) -> OperationInfo:
        assert operation_id == self.taken.operation_id
        if self.end_status is None:
            await asyncio.sleep(60)
        return self.end_status

    async def cancel(self, operation_id: str, *, asked_by: str = "") -> OperationInfo:
        self.callers.append(asked_by)
        return msgspec.structs.replace(self.get(operation_id), state="cancelled")

    def get(self, operation_id: str) -> OperationInfo:
        self._fail()
        for info in self.known:
            if info.operation_id == operation_id:
                return info
        raise UnknownName("event", operation_id, [info.operation_id for info in self.known])

    def all(self) -> list[OperationInfo]:
        self._fail()
        return self.known

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        self._fail()
        self.pin_queries.append((instance_id, location))
        return self.pinned

    def counters(self) -> Mapping[str, float]:
        return self.values

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class Client:
    """Sends to one frontend. ``last``: the response that came last, its body read."""

    def __init__(self, base: str, session: aiohttp.ClientSession) -> None:
        self.base = base
        self.session = session
        self.last: aiohttp.ClientResponse

    async def send(self, method: str, path: str, **more: object) -> tuple[int, object]:
        """Status, and the body as JSON."""
        async with self.session.request(method, self.base + path, **more) as response:
            await response.read()
            self.last = response
            return response.status, await response.json() if method != "HEAD" else None

    async def post(self, path: str, body: object) -> tuple[int, object]:
        return await self.send("POST", path, json=body)

    async def post_bytes(self, path: str, body: bytes) -> tuple[int, object]:
        return await self.send("POST", path, data=body)

    async def error(self, path: str, body: object) -> tuple[int, str, str, str]:
        """Status, code, message and hint; fails when the reply is not in the shape of errors."""
        status, reply = await (
            self.post_bytes(path, body) if isinstance(body, bytes) else self.post(path, body)
        )
        assert set(reply) == {"error"}
        assert set(reply["error"]) == {"code", "message", "hint"}
        error = reply["error"]
        return status, error["code"], error["message"], error["hint"]


Serve = Callable[..., Awaitable[Client]]


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
async def serve(controller: FakeController) -> AsyncIterator[Serve]:
    """Start a frontend with these options, and routes of plugins; the port is free, the host
    127.0.0.1."""
    started: list[HttpFrontend] = []
    async with aiohttp.ClientSession() as session:

        async def start(routes: Sequence[PluginRoute] = (), **options: object) -> Client:
            chosen = {"host": "127.0.0.1", "port": 0, **options}
            frontend = HttpFrontend(controller, HttpOptions(**chosen))
            frontend.add_routes(routes)
            await frontend.start()
            started.append(frontend)
            return Client(frontend.endpoints[0], session)

        yield start
    for frontend in started:
        await frontend.stop()


@pytest.fixture
async def client(serve: Serve) -> Client:
    return await serve()


@pytest.fixture(scope="module")
def served_port() -> Iterator[int]:
    """A frontend on a loop of its own thread, for tests that are not async."""
    ready: list[int] = []
    up = threading.Event()
    loop = asyncio.new_event_loop()

    async def run(stop: asyncio.Event) -> None:
        fake = FakeController()
        fake.matches = {"lmcache_default_instance": [("LocalCPUBackend", 1)]}
        fake.end()
        frontend = HttpFrontend(
            fake, HttpOptions(host="127.0.0.1", port=0, max_body_bytes=65536, max_tokens=64)
        )
        await frontend.start()
        ready.append(int(frontend.endpoints[0].rpartition(":")[2]))
        up.set()
        await stop.wait()
        await frontend.stop()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(stop),))
    thread.start()
    assert up.wait(10)
    yield ready[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
