"""What each route does: a request model in, a reply out.

One that is async has ``request_timeout_s`` to answer; the others answer at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from lmcache_kit.interfaces.frontend import ControllerAPI, LookupQuery
from lmcache_kit_http_api.models import (
    HealthReply,
    HealthRequest,
    HealthzReply,
    LookupReply,
    LookupRequest,
    QueryInstanceReply,
    QueryInstanceRequest,
    QueryWorkerInfoReply,
    QueryWorkerInfoRequest,
    Worker,
)

ALL_INSTANCES = "all"


@dataclass(frozen=True, slots=True)
class Raw:
    """A reply that is not one of the models."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Service:
    """What operations work with. ``metrics`` and ``openapi`` render their documents. Who waits
    for longer than ``answer_within_s`` says so himself, before he is cut off."""

    controller: ControllerAPI
    metrics: Callable[[], Raw]
    openapi: Callable[[], Raw]
    answer_within_s: float


def lookup(service: Service, request: LookupRequest) -> LookupReply:
    """Answered from the index; no worker is asked."""
    query = LookupQuery(
        tokens=request.tokens,
        model=request.model,
        cache_salt=request.cache_salt or "",
        instance_id=request.instance_id,
    )
    return LookupReply.of(service.controller.lookup(query), detail=request.detail)


async def health(service: Service, request: HealthRequest) -> HealthReply:
    """Every worker is asked, within a deadline."""
    codes = await service.controller.health(request.instance_id)
    return HealthReply(event_id=_new_event(), error_codes=codes)


def query_worker_info(service: Service, request: QueryWorkerInfoRequest) -> QueryWorkerInfoReply:
    """An instance that is called ``all`` can only be seen among all."""
    instance_id = None if request.instance_id == ALL_INSTANCES else request.instance_id
    infos = service.controller.workers(instance_id, request.worker_ids)
    return QueryWorkerInfoReply(
        event_id=_new_event(), worker_infos=[Worker.model_validate(info) for info in infos]
    )


def query_instance(service: Service, request: QueryInstanceRequest) -> QueryInstanceReply:
    """Nobody at that address is an answer (null), not an error: it is what was asked."""
    return QueryInstanceReply(
        event_id=request.event_id or _new_event(), res=service.controller.instance_at(request.ip)
    )


def healthz(service: Service, request: None) -> HealthzReply:
    """Cheap, and open to everyone: for load balancers."""
    return HealthzReply(status="ok")


def metrics(service: Service, request: None) -> Raw:
    """Prometheus text."""
    return service.metrics()


def openapi(service: Service, request: None) -> Raw:
    """This interface, described."""
    return service.openapi()


def _new_event() -> str:
    return uuid.uuid4().hex
