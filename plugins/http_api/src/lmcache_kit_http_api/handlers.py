"""The built-in routes: a request model in, a reply out.

An async handler has ``request_timeout_s`` to answer; the others answer from memory.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmcache_kit.errors import DeadlineExceeded
from lmcache_kit.interfaces.frontend import ControllerAPI, LookupQuery, OperationInfo
from lmcache_kit_http_api import operations
from lmcache_kit_http_api.models import (
    HealthReply,
    HealthRequest,
    HealthzReply,
    LookupRequest,
    QueryInstanceReply,
    QueryInstanceRequest,
    QueryWorkerInfoReply,
    QueryWorkerInfoRequest,
    Worker,
    lookup_reply,
)
from lmcache_kit_http_api.operation_models import (
    CheckFinishReply,
    ClearRequest,
    CompressRequest,
    DecompressRequest,
    EventReply,
    EventRequest,
    EventsReply,
    EventsRequest,
    MoveRequest,
    OperationAccepted,
    OperationRequest,
    PinRequest,
    PinsReply,
    PinsRequest,
    UnpinRequest,
)

ALL_INSTANCES = "all"


@dataclass(frozen=True, slots=True)
class Document:
    """A reply that is not one of the models."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that handlers work with.

    ``metrics`` and ``openapi`` render their documents. A handler that waits for longer than
    ``answer_within_s`` is cut off soon after, and should raise an error of its own before.
    ``caller``: the address of the client, for async handlers.
    """

    controller: ControllerAPI
    metrics: Callable[[], Document]
    openapi: Callable[[], Document]
    answer_within_s: float
    caller: str = ""


def lookup(context: Context, request: LookupRequest) -> dict[str, Any]:
    """Answer from the index, without asking any worker."""
    query = LookupQuery(
        tokens=request.tokens,
        model=request.model,
        cache_salt=request.cache_salt or "",
        instance_id=request.instance_id,
    )
    return lookup_reply(context.controller.instances.lookup(query), detail=request.detail)


async def health(context: Context, request: HealthRequest) -> HealthReply:
    """Ask every worker, within a deadline."""
    codes = await context.controller.instances.health(request.instance_id)
    return HealthReply(event_id=_new_event_id(), error_codes=codes)


def query_worker_info(context: Context, request: QueryWorkerInfoRequest) -> QueryWorkerInfoReply:
    """List workers. An instance that is called ``all`` is only listed among all."""
    instance_id = None if request.instance_id == ALL_INSTANCES else request.instance_id
    infos = context.controller.instances.workers(instance_id, request.worker_ids)
    return QueryWorkerInfoReply(
        event_id=_new_event_id(), worker_infos=[Worker.model_validate(info) for info in infos]
    )


async def query_instance(context: Context, request: QueryInstanceRequest) -> QueryInstanceReply:
    """Answer null, which is no error, when no instance is at that address."""
    found = await context.controller.instances.at_address(request.ip)
    return QueryInstanceReply(
        event_id=request.event_id or _new_event_id(),
        res=found[0] if found else None,
        instances=found,
    )


async def pin(context: Context, request: PinRequest) -> OperationAccepted:
    """Answer when it is done."""
    return await _finish(context, request)


async def unpin(context: Context, request: UnpinRequest) -> OperationAccepted:
    """Answer when it is done."""
    return await _finish(context, request)


async def clear(context: Context, request: ClearRequest) -> OperationAccepted:
    """Answer when it is done."""
    return await _finish(context, request)


async def compress(context: Context, request: CompressRequest) -> OperationAccepted:
    """Answer when it has started."""
    return await _start(context, request)


async def decompress(context: Context, request: DecompressRequest) -> OperationAccepted:
    """Answer when it has started."""
    return await _start(context, request)


async def move(context: Context, request: MoveRequest) -> OperationAccepted:
    """Answer when it has started, which is when its source has told what there is to move."""
    return await _start(context, request)


async def pins(context: Context, request: PinsRequest) -> PinsReply:
    """Ask each cache process."""
    pins = await context.controller.operations.pins(request.instance_id, request.location)
    return operations.to_pins(pins)


def event(context: Context, request: EventRequest) -> EventReply:
    """Answer from the operation log."""
    return operations.to_event(context.controller.operations.get(request.event_id))


def events(context: Context, request: EventsRequest) -> EventsReply:
    """Answer from the operation log."""
    return EventsReply(events=operations.selected(context.controller.operations.all(), request))


async def cancel(context: Context, request: EventRequest) -> EventReply:
    """Answer when it has ended, or after a little while."""
    return operations.to_event(
        await context.controller.operations.cancel(request.event_id, asked_by=context.caller)
    )


def check_finish(context: Context, request: EventRequest) -> CheckFinishReply:
    """Answer in the form that LMCache's clients know."""
    return CheckFinishReply(status=context.controller.operations.get(request.event_id).state)


def healthz(context: Context, request: None) -> HealthzReply:
    """Answer load balancers: cheap, and without a token."""
    return HealthzReply(status="ok")


def metrics(context: Context, request: None) -> Document:
    """Render Prometheus text."""
    return context.metrics()


def openapi(context: Context, request: None) -> Document:
    """Render the description of this interface."""
    return context.openapi()


async def _start(context: Context, request: OperationRequest) -> OperationAccepted:
    """Do not wait for the end. One that ended before it started must have ended well."""
    info = await _accepted(context, request)
    if info.started_at is None:
        operations.raise_unless_done(info)
    return operations.to_accepted(info)


async def _finish(context: Context, request: OperationRequest) -> OperationAccepted:
    """Wait for the end. While it is not there in time, the error names the event to ask for."""
    started = await _accepted(context, request)
    try:
        async with asyncio.timeout(context.answer_within_s):
            info = await context.controller.operations.wait(started.operation_id)
    except TimeoutError:
        raise DeadlineExceeded(
            f"event {started.operation_id} goes on",
            hint=f"Ask GET /events/{started.operation_id} later",
        ) from None
    operations.raise_unless_done(info)
    return operations.to_accepted(info)


async def _accepted(context: Context, request: OperationRequest) -> OperationInfo:
    """Submit a request, and return once the cache process has accepted it."""
    instance_id, wanted = operations.to_request(request)
    return await context.controller.operations.start(
        instance_id,
        wanted,
        deadline_s=request.deadline_s,
        idempotency_key=request.idempotency_key,
        asked_by=context.caller,
    )


def _new_event_id() -> str:
    return uuid.uuid4().hex
