"""Requests and replies of operations that take their time."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lmcache_kit.interfaces.frontend import EventInfo, EventPart, EventState, InstancePin, PinList
from lmcache_kit.interfaces.operations import Transfer
from lmcache_kit_http_api.models import Name, Reply, Request, Tokens

MAX_SECONDS = 10 * 365 * 86400.0


def _not_none(tokens: list[int]) -> list[int]:
    if not tokens:
        raise PydanticCustomError("no_tokens", "an empty list names no tokens")
    return tokens


SomeTokens = Annotated[Tokens, AfterValidator(_not_none)]
Position = tuple[Name, Name]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Salt = Annotated[str, StringConstraints(max_length=1024)]
OperationName = Literal["pin", "unpin", "clear", "compress", "decompress", "move"]


class Place(NamedTuple):
    """A location of an instance."""

    instance_id: str
    location: str


class AnyOrderRequest(Request):
    """What every operation is asked with. ``place``: which cache process the order goes to."""

    tokens: Tokens | None = None
    model: Name | None = Field(None, description="Only KV of this model (its served name).")
    cache_salt: Salt | None = Field(
        None, description="The cache_salt that the prompt was sent with."
    )
    deadline_s: Seconds | None = Field(
        None,
        description="It has ended by then, in one way or another. Default: 600 for compress, "
        "decompress and move, else 10.",
    )
    idempotency_key: Name | None = Field(
        None, description="The same key with the same request is the same event."
    )

    @property
    def place(self) -> Place:
        raise NotImplementedError


class OrderRequest(AnyOrderRequest):
    """What every operation at one place is asked with."""

    instance_id: Name
    location: Name = Field(description="Name of the storage, such as LocalCPUBackend.")

    @property
    def place(self) -> Place:
        return Place(self.instance_id, self.location)


class PinRequest(OrderRequest):
    """Keep what is stored of these tokens."""

    tokens: SomeTokens = Field(description="Token ids of the prompt, from its first token.")
    ttl_s: Seconds | None = Field(None, description="For so long; default: pin_timeout_sec.")
    owner: Annotated[str, StringConstraints(max_length=256)] = Field(
        "", description="Who asked; shown by GET /pins."
    )


class UnpinRequest(OrderRequest):
    """End one pin, or all that lie within these tokens."""

    tokens: SomeTokens | None = Field(None, description="As they were pinned, or more.")
    pin_id: Name | None = Field(None, description="The event_id of the pin.")

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.tokens is None and self.pin_id is None:
            raise PydanticCustomError("nothing_named", "tokens or pin_id is required")
        return self


class ClearRequest(OrderRequest):
    """Forget what is stored of these tokens, or everything there."""

    tokens: SomeTokens | None = Field(None, description="Absent: everything at that location.")
    force: bool = Field(False, description="Pinned chunks as well.")


class CodecRequest(OrderRequest):
    """Encode or decode what is stored of these tokens, or everything there."""

    method: Name = Field(description="Name of a codec, such as cachegen.")
    tokens: Tokens | None = Field(None, description="Absent or empty: everything at that location.")


class MoveRequest(AnyOrderRequest):
    """Bring what is stored of these tokens, or everything there, to another instance."""

    old_position: Position = Field(
        description="Instance and location to take from.",
        examples=[["lmcache_instance_1", "LocalCPUBackend"]],
    )
    new_position: Position = Field(
        description="Instance and location to bring it to.",
        examples=[["lmcache_instance_2", "LocalCPUBackend"]],
    )
    tokens: Tokens | None = Field(None, description="Absent or empty: everything at that location.")
    # Models have a method of this name.
    copy_: bool = Field(False, alias="copy", description="Leave it where it was as well.")
    should_copy: bool | None = Field(None, description="Another name of copy.")

    @property
    def place(self) -> Place:
        return Place(*self.new_position)

    @property
    def stays(self) -> bool:
        """Whether the source keeps it."""
        return self.copy_ if self.should_copy is None else self.should_copy

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if "copy_" in self.model_fields_set and self.stays != self.copy_:
            raise PydanticCustomError("two_wishes", "copy and should_copy say different things")
        return self


class OrderReply(Reply):
    """``num_tokens``: what it took effect on, exactly; for compress, decompress and move what it
    is about, as they go on after the reply. ``message`` is there if there is more to say."""

    event_id: str
    num_tokens: int
    message: str | None = None

    @model_serializer(mode="wrap")
    def _short(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown: dict[str, Any] = inner(self)
        if not self.message:
            shown.pop("message", None)
        return shown


class TransferReply(Reply):
    """How KV comes from another cache process. ``description``: over what, and why not otherwise.
    ``seconds``: for how long bytes were under way."""

    transport: str
    description: str
    bytes: int
    seconds: float
    gb_per_s: float

    @classmethod
    def of(cls, transfer: Transfer) -> TransferReply:
        """As its cache process told it."""
        return cls(
            transport=transfer.transport,
            description=transfer.description,
            bytes=transfer.nbytes,
            seconds=transfer.seconds,
            gb_per_s=transfer.bytes_per_s / 1e9,
        )


class PartReply(Reply):
    """How far it has come at one location. The workers named hold each chunk together; bytes are
    those of the chunks done, before and after. ``transfer`` is null unless it is a move, and until
    a way was found."""

    instance_id: str
    location: str
    worker_ids: tuple[int, ...]
    chunks_done: int
    chunks: int
    bytes_before: int
    bytes_after: int
    transfer: TransferReply | None

    @classmethod
    def of(cls, part: EventPart) -> PartReply:
        """One part of an event."""
        transfer = part.progress.transfer
        return cls(
            instance_id=part.instance_id,
            location=part.location,
            worker_ids=part.worker_ids,
            chunks_done=part.progress.chunks_done,
            chunks=part.progress.chunks,
            bytes_before=part.progress.bytes_before,
            bytes_after=part.progress.bytes_after,
            transfer=TransferReply.of(transfer) if transfer else None,
        )


class EventReply(Reply):
    """One operation. Times are seconds since the epoch; ``num_tokens`` is what it is about, and
    once it has ended what it took effect on; ``ratio`` is bytes before by bytes after. Positions
    are null unless it is a move; ``instance_id`` and ``location`` are where that goes to."""

    event_id: str
    operation: str
    instance_id: str
    location: str
    old_position: tuple[str, str] | None
    new_position: tuple[str, str] | None
    state: EventState
    num_tokens: int
    message: str
    ratio: float | None
    progress: list[PartReply]
    created: float
    started: float | None
    ended: float | None
    deadline: float
    idempotency_key: str | None

    @classmethod
    def of(cls, info: EventInfo) -> EventReply:
        """What the controller knows of it."""
        return cls(
            event_id=info.event_id,
            operation=info.operation,
            instance_id=info.instance_id,
            location=info.location,
            old_position=info.source,
            new_position=(info.instance_id, info.location) if info.source else None,
            state=info.state,
            num_tokens=info.tokens,
            message=info.message,
            ratio=info.ratio,
            progress=[PartReply.of(part) for part in info.parts],
            created=info.created,
            started=info.started,
            ended=info.ended,
            deadline=info.deadline,
            idempotency_key=info.idempotency_key,
        )


class EventRequest(Request):
    """Which event?"""

    event_id: Name


class EventsRequest(Request):
    """Which events?"""

    state: EventState | None = Field(None, description="Only those in this state.")
    operation: OperationName | None = Field(None, description="Only these.")
    instance_id: Name | None = Field(
        None, description="Only those of this instance; moves from and to it."
    )
    limit: Annotated[int, Field(ge=1, le=1000)] = Field(100, description="The latest so many.")


class EventsReply(Reply):
    """The latest first. Ended ones are kept for an hour, up to a thousand."""

    events: list[EventReply]


class CheckFinishReply(Reply):
    """``queued`` and ``running`` are not the end; every other state is."""

    status: EventState


class PinsRequest(Request):
    """Which pins?"""

    instance_id: Name | None = Field(None, description="Only those of this instance.")
    location: Name | None = Field(None, description="Only those at this location.")


class PinReply(Reply):
    """One pin. ``expires_in_s`` is null for one without an end."""

    pin_id: str
    instance_id: str
    location: str
    num_tokens: int
    chunks: int
    bytes: int
    owner: str
    expires_in_s: float | None

    @classmethod
    def of(cls, found: InstancePin) -> PinReply:
        """As its cache process told it."""
        pin = found.pin
        return cls(
            pin_id=pin.pin_id,
            instance_id=found.instance_id,
            location=pin.location,
            num_tokens=pin.tokens,
            chunks=pin.chunks,
            bytes=pin.nbytes,
            owner=pin.owner,
            expires_in_s=pin.expires_in_s,
        )


class PinsReply(Reply):
    """Each cache process was asked; ``unanswered`` names the instances that did not answer."""

    pins: list[PinReply]
    unanswered: list[str]

    @classmethod
    def of(cls, found: PinList) -> PinsReply:
        """What the controller was told."""
        return cls(pins=[PinReply.of(pin) for pin in found.pins], unanswered=list(found.unanswered))
