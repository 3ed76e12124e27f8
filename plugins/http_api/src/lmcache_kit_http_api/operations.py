"""Conversion between the models of REST and the controller's records of operations.

The only module of this package that builds or reads those records.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmcache_kit.errors import ControlError, DeadlineExceeded, OperationFailed
from lmcache_kit.interfaces.frontend import EventInfo, EventPart, InstancePin, Operation, PinList
from lmcache_kit.interfaces.operations import (
    Clear,
    Compress,
    Decompress,
    Move,
    Pin,
    Transfer,
    Unpin,
)
from lmcache_kit.keys import pack_tokens
from lmcache_kit_http_api.operation_models import (
    ClearRequest,
    CompressRequest,
    DecompressRequest,
    EventReply,
    EventsRequest,
    MoveRequest,
    OperationAccepted,
    OperationRequest,
    PinReply,
    PinRequest,
    PinsReply,
    ProgressReply,
    TransferReply,
    UnpinRequest,
)


def to_operation(request: OperationRequest) -> Operation:
    """Convert a request. An empty list of tokens means all tokens, as None does."""
    if isinstance(request, MoveRequest):
        instance_id, location = request.new_position
    else:
        instance_id, location = request.instance_id, request.location
    kind, fields = _own_fields(request)
    return Operation(
        instance_id=instance_id,
        order=kind(
            location=location,
            tokens=pack_tokens(request.tokens) if request.tokens else None,
            cache_salt=request.cache_salt or "",
            model=request.model,
            **fields,
        ),
        deadline_s=request.deadline_s,
        idempotency_key=request.idempotency_key,
    )


def _own_fields(request: OperationRequest) -> tuple[type[Any], dict[str, Any]]:
    """Return the record of a request, and the fields that only this one has."""
    match request:
        case PinRequest():
            return Pin, {"pin_id": "", "owner": request.owner, "ttl_s": request.ttl_s}
        case UnpinRequest():
            return Unpin, {"pin_id": request.pin_id}
        case ClearRequest():
            return Clear, {"force": request.force}
        case CompressRequest():
            return Compress, {"method": request.method}
        case DecompressRequest():
            return Decompress, {"method": request.method}
        case MoveRequest():
            source, source_location = request.old_position
            return Move, {
                "source": source,
                "source_location": source_location,
                "copy": request.keeps_source,
            }


def to_accepted(status: EventInfo) -> OperationAccepted:
    """Show an operation to the client that asked for it."""
    return OperationAccepted(
        event_id=status.event_id, num_tokens=status.tokens, message=status.message
    )


def raise_unless_done(status: EventInfo) -> None:
    """Raise OperationFailed, DeadlineExceeded or ControlError for an operation that has failed,
    expired or was cancelled."""
    reason = f"event {status.event_id}: {status.message or status.state}"
    match status.state:
        case "failed":
            raise OperationFailed(reason)
        case "expired":
            raise DeadlineExceeded(reason)
        case "cancelled":
            raise ControlError(reason)


def to_event(status: EventInfo) -> EventReply:
    """Show an operation with its progress."""
    return EventReply(
        event_id=status.event_id,
        operation=status.operation,
        instance_id=status.instance_id,
        location=status.location,
        old_position=status.source,
        new_position=(status.instance_id, status.location) if status.source else None,
        state=status.state,
        num_tokens=status.tokens,
        message=status.message,
        ratio=status.ratio,
        progress=[_progress(part) for part in status.parts],
        created=status.created,
        started=status.started,
        ended=status.ended,
        deadline=status.deadline,
        idempotency_key=status.idempotency_key,
    )


def _progress(part: EventPart) -> ProgressReply:
    progress = part.progress
    return ProgressReply(
        instance_id=part.instance_id,
        location=part.location,
        worker_ids=part.worker_ids,
        chunks_done=progress.chunks_done,
        chunks=progress.chunks,
        bytes_before=progress.bytes_before,
        bytes_after=progress.bytes_after,
        transfer=_transfer(progress.transfer) if progress.transfer else None,
    )


def _transfer(transfer: Transfer) -> TransferReply:
    return TransferReply(
        transport=transfer.transport,
        how=transfer.how,
        bytes=transfer.nbytes,
        seconds=transfer.seconds,
        gb_per_s=transfer.bytes_per_s / 1e9,
    )


def selected(statuses: Iterable[EventInfo], request: EventsRequest) -> list[EventReply]:
    """Show the operations that a request asks for, in the order given."""
    matching = (
        status
        for status in statuses
        if request.state in (None, status.state)
        and request.operation in (None, status.operation)
        and request.instance_id in (None, status.instance_id, *(status.source or ())[:1])
    )
    return [to_event(status) for status, _ in zip(matching, range(request.limit), strict=False)]


def to_pins(pins: PinList) -> PinsReply:
    """Show pins, and which instances did not answer."""
    return PinsReply(pins=[_pin(found) for found in pins.pins], unanswered=list(pins.unanswered))


def _pin(found: InstancePin) -> PinReply:
    pin = found.pin
    return PinReply(
        pin_id=pin.pin_id,
        instance_id=found.instance_id,
        location=pin.location,
        num_tokens=pin.tokens,
        chunks=pin.chunks,
        bytes=pin.nbytes,
        owner=pin.owner,
        expires_in_s=pin.expires_in_s,
    )
