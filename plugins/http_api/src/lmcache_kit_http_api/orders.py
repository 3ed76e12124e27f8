"""What the routes of operations do: give an order to a cache process, and follow it."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from lmcache_kit.errors import ControlError, DeadlineExceeded, OperationFailed
from lmcache_kit.interfaces.frontend import EventInfo, Operation
from lmcache_kit.interfaces.operations import (
    Clear,
    Compress,
    Decompress,
    Move,
    Order,
    Pin,
    Unpin,
)
from lmcache_kit.keys import pack_tokens
from lmcache_kit_http_api.operations import Service
from lmcache_kit_http_api.order_models import (
    AnyOrderRequest,
    CheckFinishReply,
    ClearRequest,
    CodecRequest,
    EventReply,
    EventRequest,
    EventsReply,
    EventsRequest,
    MoveRequest,
    OrderReply,
    PinRequest,
    PinsReply,
    PinsRequest,
    UnpinRequest,
)

_O = TypeVar("_O", Pin, Unpin, Clear, Compress, Decompress, Move)


async def pin(service: Service, request: PinRequest) -> OrderReply:
    """Answered when it is done."""
    order = _order(Pin, request, pin_id="", owner=request.owner, ttl_s=request.ttl_s)
    return await _done(service, request, order)


async def unpin(service: Service, request: UnpinRequest) -> OrderReply:
    """Answered when it is done."""
    return await _done(service, request, _order(Unpin, request, pin_id=request.pin_id))


async def clear(service: Service, request: ClearRequest) -> OrderReply:
    """Answered when it is done."""
    return await _done(service, request, _order(Clear, request, force=request.force))


async def compress(service: Service, request: CodecRequest) -> OrderReply:
    """Answered when it has begun."""
    return await _begun(service, request, _order(Compress, request, method=request.method))


async def decompress(service: Service, request: CodecRequest) -> OrderReply:
    """Answered when it has begun."""
    return await _begun(service, request, _order(Decompress, request, method=request.method))


async def move(service: Service, request: MoveRequest) -> OrderReply:
    """Answered when it has begun: when its source has told what there is to move."""
    source, location = request.old_position
    order = _order(Move, request, source=source, source_location=location, copy=request.stays)
    return await _begun(service, request, order)


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
        and request.instance_id in (None, info.instance_id, *(info.source or ())[:1])
    ]
    return EventsReply(events=[EventReply.of(info) for info in chosen[: request.limit]])


async def cancel(service: Service, request: EventRequest) -> EventReply:
    """Answered when it has ended, or after a little while."""
    return EventReply.of(await service.controller.cancel(request.event_id))


def check_finish(service: Service, request: EventRequest) -> CheckFinishReply:
    """As LMCache's clients ask."""
    return CheckFinishReply(status=service.controller.event(request.event_id).state)


def _order(kind: type[_O], request: AnyOrderRequest, **more: Any) -> _O:
    """With what all orders have in common; no tokens at all are all of them."""
    return kind(
        location=request.place.location,
        tokens=pack_tokens(request.tokens) if request.tokens else None,
        cache_salt=request.cache_salt or "",
        model=request.model,
        **more,
    )


async def _begun(service: Service, request: AnyOrderRequest, order: Order) -> OrderReply:
    """Do not wait for the end, unless it came before it began."""
    info = await service.controller.operate(_operation(request, order))
    return _reply(info if info.started is not None else _well(info))


async def _done(service: Service, request: AnyOrderRequest, order: Order) -> OrderReply:
    """Wait for the end; one that is not as asked is an error, with the event to look at."""
    begun = await service.controller.operate(_operation(request, order))
    try:
        async with asyncio.timeout(service.answer_within_s):
            info = await service.controller.ended(begun.event_id)
    except TimeoutError:
        raise DeadlineExceeded(
            f"event {begun.event_id} goes on", hint=f"Ask GET /events/{begun.event_id} later"
        ) from None
    return _reply(_well(info))


def _well(info: EventInfo) -> EventInfo:
    """The same, if it has not ended otherwise than it was asked for."""
    told = f"event {info.event_id}: {info.message or info.state}"
    match info.state:
        case "failed":
            raise OperationFailed(told)
        case "expired":
            raise DeadlineExceeded(told)
        case "cancelled":
            raise ControlError(told)
    return info


def _operation(request: AnyOrderRequest, order: Order) -> Operation:
    return Operation(
        instance_id=request.place.instance_id,
        order=order,
        deadline_s=request.deadline_s,
        idempotency_key=request.idempotency_key,
    )


def _reply(info: EventInfo) -> OrderReply:
    return OrderReply(event_id=info.event_id, num_tokens=info.tokens, message=info.message)
