"""Requests that start an operation, and replies that show operations and pins."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lmcache_kit.interfaces.operations import OperationState
from lmcache_kit_http_api.models import Name, Reply, Request, Salt, Tokens, TokensRequest

MAX_SECONDS = 10 * 365 * 86400.0


def _not_empty(tokens: list[int]) -> list[int]:
    if not tokens:
        raise PydanticCustomError("no_tokens", "an empty list names no tokens")
    return tokens


SomeTokens = Annotated[Tokens, AfterValidator(_not_empty)]
Position = tuple[Name, Name]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
OperationName = Literal["pin", "unpin", "clear", "compress", "decompress", "move"]


class OperationFields(TokensRequest):
    """Fields of every operation."""

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


class LocatedFields(OperationFields):
    """Fields of every operation at one location."""

    instance_id: Name
    location: Name = Field(description="Name of the storage, such as LocalCPUBackend.")


class PinRequest(LocatedFields):
    """Keep what is stored of these tokens."""

    tokens: SomeTokens = Field(description="Token ids of the prompt, from its first token.")
    ttl_s: Seconds | None = Field(None, description="For so long; default: pin_timeout_sec.")
    owner: Annotated[str, StringConstraints(max_length=256)] = Field(
        "", description="Who asked; shown by GET /pins."
    )


class UnpinRequest(LocatedFields):
    """End one pin, or all that lie within these tokens."""

    tokens: SomeTokens | None = Field(None, description="As they were pinned, or more.")
    pin_id: Name | None = Field(None, description="The event_id of the pin.")

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.tokens is None and self.pin_id is None:
            raise PydanticCustomError("nothing_named", "tokens or pin_id is required")
        return self


class ClearRequest(LocatedFields):
    """Delete what is stored of these tokens and what follows them, or everything at a location."""

    tokens: SomeTokens | None = Field(None, description="Absent: everything at that location.")
    force: bool = Field(False, description="Pinned chunks as well.")


class CompressRequest(LocatedFields):
    """Encode what is stored of these tokens, or everything at a location."""

    method: Name = Field(description="Name of a codec, such as cachegen.")
    tokens: Tokens | None = Field(None, description="Absent or empty: everything at that location.")


class DecompressRequest(LocatedFields):
    """Decode what is stored of these tokens, or everything at a location."""

    method: Name = Field(description="Name of a codec, such as cachegen.")
    tokens: Tokens | None = Field(None, description="Absent or empty: everything at that location.")


class MoveRequest(OperationFields):
    """Move what is stored of these tokens, or everything at a location, to another location."""

    old_position: Position = Field(
        description="Instance and location to take from.",
        examples=[["lmcache_instance_1", "LocalCPUBackend"]],
    )
    new_position: Position = Field(
        description="Instance and location to bring it to.",
        examples=[["lmcache_instance_2", "LocalCPUBackend"]],
    )
    tokens: Tokens | None = Field(None, description="Absent or empty: everything at that location.")
    # BaseModel has a method ``copy``.
    copy_: bool = Field(False, alias="copy", description="Leave it where it was as well.")
    should_copy: bool | None = Field(None, description="Another name of copy.")

    @property
    def keeps_source(self) -> bool:
        """Whether the source keeps its KV."""
        return self.copy_ if self.should_copy is None else self.should_copy

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if "copy_" in self.model_fields_set and self.keeps_source != self.copy_:
            raise PydanticCustomError("two_wishes", "copy and should_copy say different things")
        return self


OperationRequest: TypeAlias = (
    PinRequest | UnpinRequest | ClearRequest | CompressRequest | DecompressRequest | MoveRequest
)


class OperationAccepted(Reply):
    """``num_tokens``: for pin, unpin and clear, the tokens that it took effect on; for compress,
    decompress and move, which go on after the reply, those that it is about. ``message`` is there
    if there is more to say."""

    event_id: str
    num_tokens: int
    message: str | None = None

    @model_serializer(mode="wrap")
    def _without_empty_message(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown: dict[str, Any] = inner(self)
        if not self.message:
            shown.pop("message", None)
        return shown


class TransferReply(Reply):
    """The transfer of KV from another location.

    ``description``: over what, and why not otherwise. ``seconds``: for how long bytes were under
    way.
    """

    transport: str
    description: str
    bytes: int
    seconds: float
    gb_per_s: float


class ProgressReply(Reply):
    """Progress at one location. The workers named hold each chunk together; bytes are those of the
    chunks done, before and after. ``transfer`` is null unless it is a move, and until a transport
    was chosen."""

    instance_id: str
    location: str
    worker_ids: tuple[int, ...]
    chunks_done: int
    chunks: int
    bytes_before: int
    bytes_after: int
    transfer: TransferReply | None


class EventReply(Reply):
    """One operation. Times are seconds since the epoch; ``num_tokens`` is what it is about, and
    once it has ended what it took effect on; ``ratio`` is bytes before by bytes after. Positions
    are null unless it is a move; ``instance_id`` and ``location`` are its destination."""

    event_id: str
    operation: str
    instance_id: str
    location: str
    old_position: tuple[str, str] | None
    new_position: tuple[str, str] | None
    state: OperationState
    num_tokens: int
    message: str
    ratio: float | None
    progress: list[ProgressReply]
    created: float
    started: float | None
    ended: float | None
    deadline: float
    idempotency_key: str | None


class EventRequest(Request):
    """Which event?"""

    event_id: Name


class EventsRequest(Request):
    """Which events?"""

    state: OperationState | None = Field(None, description="Only those in this state.")
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

    status: OperationState


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


class PinsReply(Reply):
    """Each cache process was asked; ``unanswered`` names the instances that did not answer."""

    pins: list[PinReply]
    unanswered: list[str]
