"""What the routes of operations do: give an order to a cache process, and follow it."""

from __future__ import annotations

import asyncio

from lmcache_kit.errors import ControlError, DeadlineExceeded, OperationFailed
from lmcache_kit.interfaces.frontend import EventInfo, Operation
from lmcache_kit.interfaces.operations import Clear, Compress, Decompress, Order, Pin, Unpin
from lmcache_kit.keys import pack_tokens
from lmcache_kit_http_api.operations import Service
from lmcache_kit_http_api.order_models import (
    CheckFinishReply,
    ClearRequest,
    CodecRequest,
    EventReply,
    EventRequest,
    EventsReply,
    EventsRequest,
    OrderReply,
    OrderRequest,
    PinRequest,
    PinsReply,
    PinsRequest,
    UnpinRequest,
)


async def pin(service: Service, request: PinRequest) -> OrderReply:
    """Answered when it is done."""
    order = Pin(
        location=request.location,
        tokens=_packed(request.tokens),
        cache_salt=request.cache_salt or "",
        model=request.model,
        pin_id="",
        owner=request.owner,
        ttl_s=request.ttl_s,
    )
    return await _done(service, request, order)


async def unpin(service: Service, request: UnpinRequest) -> OrderReply:
    """Answered when it is done."""
    order = Unpin(
        location=request.location,
        tokens=_packed(request.tokens),
        cache_salt=request.cache_salt or "",
        model=request.model,
        pin_id=request.pin_id,
    )
    return await _done(service, request, order)


async def clear(service: Service, request: ClearRequest) -> OrderReply:
    """Answered when it is done."""
    order = Clear(
        location=request.location,
        tokens=_packed(request.tokens),
        cache_salt=request.cache_salt or "",
        model=request.model,
        force=request.force,
    )
    return await _done(service, request, order)


async def compress(service: Service, request: CodecRequest) -> OrderReply:
    """Answered when it has begun."""
    return await _recode(service, request, Compress)


async def decompress(service: Service, request: CodecRequest) -> OrderReply:
    """Answered when it has begun."""
    return await _recode(service, request, Decompress)


async def pins(service: Service, request: PinsRequest) -> PinsReply:
    """Each cache process is asked."""
    return PinsReply.of(await service.controller.pins(request.instance_id, request.location))


def event(service: Service, request: EventRequest) -> EventReply:
    """Answered from the ledger."""
    return EventReply.of(service.controller.event(request.event_id))


def events(service: Service, request: EventsRequest) -> EventsReply:
    """Answered from the ledger."""
    chosen = [
        info
        for info in service.controller.events()
        if request.state in (None, info.state)
        and request.operation in (None, info.operation)
        and request.instance_id in (None, info.instance_id)
    ]
    return EventsReply(events=[EventReply.of(info) for info in chosen[: request.limit]])


async def cancel(service: Service, request: EventRequest) -> EventReply:
    """Answered when it has ended, or after a little while."""
    return EventReply.of(await service.controller.cancel(request.event_id))


def check_finish(service: Service, request: EventRequest) -> CheckFinishReply:
    """As LMCache's clients ask."""
    return CheckFinishReply(status=service.controller.event(request.event_id).state)


async def _recode(
    service: Service, request: CodecRequest, kind: type[Compress | Decompress]
) -> OrderReply:
    order = kind(
        location=request.location,
        tokens=_packed(request.tokens),
        cache_salt=request.cache_salt or "",
        model=request.model,
        method=request.method,
    )
    return _reply(await service.controller.operate(_operation(request, order)))


async def _done(service: Service, request: OrderRequest, order: Order) -> OrderReply:
    """Wait for the end; one that is not as asked is an error, with the event to look at."""
    begun = await service.controller.operate(_operation(request, order))
    try:
        async with asyncio.timeout(service.answer_within_s):
            info = await service.controller.ended(begun.event_id)
    except TimeoutError:
        raise DeadlineExceeded(
            f"event {begun.event_id} goes on", hint=f"Ask GET /events/{begun.event_id} later"
        ) from None
    told = f"event {info.event_id}: {info.message or info.state}"
    match info.state:
        case "failed":
            raise OperationFailed(told)
        case "expired":
            raise DeadlineExceeded(told)
        case "cancelled":
            raise ControlError(told)
    return _reply(info)


def _operation(request: OrderRequest, order: Order) -> Operation:
    return Operation(
        instance_id=request.instance_id,
        order=order,
        deadline_s=request.deadline_s,
        idempotency_key=request.idempotency_key,
    )


def _reply(info: EventInfo) -> OrderReply:
    return OrderReply(event_id=info.event_id, num_tokens=info.tokens, message=info.message)


def _packed(tokens: list[int] | None) -> bytes | None:
    """No tokens at all are all of them."""
    return pack_tokens(tokens) if tokens else None
