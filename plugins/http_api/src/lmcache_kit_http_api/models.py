"""Requests and replies as pydantic models. The OpenAPI document is generated from these."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from lmcache_kit.interfaces.frontend import LookupAnswer

MAX_TOKEN = 2**32 - 1
MAX_WORKER = 2**31 - 1

RESERVED_KEYS = frozenset({"event_id", "layout_info", "detail", "error"})
"""Keys of a lookup reply that no instance id may take; such an instance is in layout_info only."""


def _within_limit(tokens: list[int], info: ValidationInfo) -> list[int]:
    limit = (info.context or {}).get("max_tokens")
    if limit is not None and len(tokens) > limit:
        raise PydanticCustomError(
            "too_many_tokens",
            "{count} tokens are more than the {limit} allowed",
            {"count": len(tokens), "limit": limit},
        )
    return tokens


class _FailFast(FailFast):
    """Pydantic's own, with a hash, as ``| None`` needs one."""

    __hash__ = object.__hash__


Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Salt = Annotated[str, StringConstraints(max_length=1024)]
Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
Tokens = Annotated[list[Token], _FailFast(), AfterValidator(_within_limit)]
WorkerIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_WORKER)]], Field(max_length=4096)]
Match = tuple[str, int]

_TOKENIZE = "A field of the reply of vLLM's `/tokenize`; has no effect."


class Request(BaseModel):
    """Base of all requests. Types are strict: ``true`` and ``1.0`` are no numbers. Unknown fields
    are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Reply(BaseModel):
    """Base of all replies."""

    model_config = ConfigDict(frozen=True)


class ErrorBody(Reply):
    """What went wrong."""

    code: str = Field(description="Stable, for programs.")
    message: str = Field(description="Names the thing and the value.")
    hint: str = Field(description="What to do next; may be empty.")


class ErrorReply(Reply):
    """The one shape of every reply with a status other than 200."""

    error: ErrorBody


class TokensRequest(Request):
    """Base of requests with tokens, for which the reply of vLLM's ``/tokenize`` can be posted as it
    is: the fields that stand there beside ``tokens`` are known and have no effect."""

    count: Annotated[int, Field(ge=0)] | None = Field(None, description=_TOKENIZE)
    max_model_len: Annotated[int, Field(ge=0)] | None = Field(None, description=_TOKENIZE)
    token_strs: list[str] | None = Field(None, description=_TOKENIZE)


class LookupRequest(TokensRequest):
    """Who holds the KV of these tokens?"""

    tokens: Tokens = Field(
        description="Token ids of the prompt, from its first token.",
        examples=[[128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]],
    )
    model: Name | None = Field(None, description="Only KV of this model (its served name).")
    cache_salt: Salt | None = Field(
        None, description="The cache_salt that the prompt was sent with."
    )
    instance_id: Name | None = Field(None, description="Only this instance.")
    detail: bool = Field(False, description="Add every location and why its match stopped.")


class LocationDetail(Reply):
    """The match at one location, counted from the first token without a gap."""

    location: str
    tokens: int
    stopped: str = Field(
        description="end: everything matched; missing: nobody holds what follows; "
        "elsewhere: another holder does."
    )


class LookupReply(Reply):
    """Per instance, the location of the longest match and its length in tokens.

    Every instance stands in ``layout_info``, and beside it as a key of its own unless its id is
    one of ``event_id``, ``layout_info``, ``detail`` and ``error``.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "event_id": "6f1c",
                    "lmcache_default_instance": ["LocalCPUBackend", 12],
                    "layout_info": {"lmcache_default_instance": ["LocalCPUBackend", 12]},
                }
            ]
        },
    )
    __pydantic_extra__: dict[str, Match] = Field(init=False)

    event_id: str
    layout_info: dict[str, Match]
    detail: dict[str, list[LocationDetail]] | None = Field(None, description="If asked for.")


def lookup_reply(answer: LookupAnswer, *, detail: bool) -> dict[str, Any]:
    """Build the fields of a :class:`LookupReply`, without the cost of validating them."""
    layout = {
        match.instance_id: (match.best.location, match.best.tokens) for match in answer.instances
    }
    reply: dict[str, Any] = {"event_id": answer.lookup_id}
    reply |= {name: found for name, found in layout.items() if name not in RESERVED_KEYS}
    reply["layout_info"] = layout
    if detail:
        reply["detail"] = {
            match.instance_id: [
                {"location": at.location, "tokens": at.tokens, "stopped": at.stopped}
                for at in match.locations
            ]
            for match in answer.instances
        }
    return reply


class HealthRequest(Request):
    """Are the workers of this instance well?"""

    instance_id: Name


class HealthReply(Reply):
    """Each worker was asked; 0 means well."""

    event_id: str
    error_codes: dict[int, int] = Field(description="Worker id to error code.")


class QueryWorkerInfoRequest(Request):
    """Which workers does this instance have?"""

    instance_id: Name = Field(description='An instance, or "all".')
    worker_ids: WorkerIds | None = Field(None, description="Only these.")


class ServedModel(Reply):
    """A model whose KV an instance stores. KV is shared where ``namespace`` is equal."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    model: str = Field(description="Its served name.")
    weights: str = Field(description="Digest of its weights.")
    config: str = Field(description="Digest of the settings that KV depends on.")
    generation: str = Field(description="Set once the engine has dropped its cache.")
    chunk_size: int
    namespace: str = Field(description="Digest of all that KV depends on.")


class Worker(Reply):
    """One rank of an instance. Times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    instance_id: str
    worker_id: int
    ip: str
    port: int
    peer_init_url: str | None
    registration_time: float
    last_heartbeat_time: float
    alive: bool
    models: list[ServedModel]


class QueryWorkerInfoReply(Reply):
    """Registered workers, including those that no longer send heartbeats."""

    event_id: str
    worker_infos: list[Worker]


class QueryInstanceRequest(Request):
    """Which instances registered from this address?"""

    event_id: Name | None = Field(None, description="Sent back; made up when absent.")
    ip: Name = Field(description="An IPv4 or IPv6 address, or the name of a host.")


class QueryInstanceReply(Reply):
    """``res`` is null when no instance registered from there, and the first of ``instances`` when
    several did."""

    event_id: str
    res: str | None
    instances: tuple[str, ...] = Field(
        description="All of them: those alive first, and of these the latest registration first."
    )


class HealthzReply(Reply):
    """The controller serves."""

    status: str
