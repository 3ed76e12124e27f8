"""The one table of routes. It drives routing, validation and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from lmcache_kit_http_api import models, operations, order_models, orders
from lmcache_kit_http_api.operations import Raw, Service
from lmcache_kit_http_api.problems import ApiError, clip

_Q = TypeVar("_Q")

Answer: TypeAlias = models.Reply | Raw


@dataclass(frozen=True, slots=True)
class Route(Generic[_Q]):
    """``path``: may have names in braces, each of which stands for one part. ``request``: the
    model of what is asked, None for a route that asks for nothing. ``source``: whether that is
    the JSON body, or path and query. ``reply``: a model, or the content type of a document.
    ``errors``: statuses beyond those that every route may answer. ``open``: served without a
    token.
    """

    method: str
    path: str
    operation: Callable[[Service, _Q], Answer | Coroutine[Any, Any, Answer]]
    request: type[_Q] | None
    reply: type[models.Reply] | str
    summary: str
    errors: tuple[int, ...] = ()
    source: Literal["body", "url"] = "body"
    open: bool = False


class Found(NamedTuple):
    """A route, and the names in its path."""

    route: Route[Any]
    names: Mapping[str, str]


_ORDER_ERRORS = (404, 409, 502, 503, 504)


ROUTES: tuple[Route[Any], ...] = (
    Route(
        "POST", "/lookup", operations.lookup, models.LookupRequest, models.LookupReply,
        "Find who holds the KV of a prompt",
        errors=(404,),
    ),
    Route(
        "POST", "/health", operations.health, models.HealthRequest, models.HealthReply,
        "Ask the workers of an instance whether they are well",
        errors=(404, 503, 504),
    ),
    Route(
        "POST", "/query_worker_info", operations.query_worker_info,
        models.QueryWorkerInfoRequest, models.QueryWorkerInfoReply,
        "List the workers of one instance or of all",
        errors=(404,),
    ),
    Route(
        "POST", "/query_instance", operations.query_instance,
        models.QueryInstanceRequest, models.QueryInstanceReply,
        "Name the instance that registered from an address",
    ),
    Route(
        "POST", "/pin", orders.pin, order_models.PinRequest, order_models.OrderReply,
        "Keep what is stored of a prompt, whatever else is evicted",
        errors=_ORDER_ERRORS,
    ),
    Route(
        "POST", "/unpin", orders.unpin, order_models.UnpinRequest, order_models.OrderReply,
        "End pins",
        errors=_ORDER_ERRORS,
    ),
    Route(
        "POST", "/clear", orders.clear, order_models.ClearRequest, order_models.OrderReply,
        "Forget what is stored of a prompt, or everything at a location",
        errors=_ORDER_ERRORS,
    ),
    Route(
        "POST", "/compress", orders.compress, order_models.CodecRequest, order_models.OrderReply,
        "Begin to encode what is stored of a prompt, or everything at a location",
        errors=_ORDER_ERRORS,
    ),
    Route(
        "POST", "/decompress", orders.decompress, order_models.CodecRequest,
        order_models.OrderReply,
        "Begin to decode what is stored of a prompt, or everything at a location",
        errors=_ORDER_ERRORS,
    ),
    Route(
        "POST", "/move", orders.move, order_models.MoveRequest, order_models.OrderReply,
        "Begin to bring what is stored of a prompt, or everything at a location, to another "
        "instance",
        errors=_ORDER_ERRORS,
    ),
    Route(
        "GET", "/pins", orders.pins, order_models.PinsRequest, order_models.PinsReply,
        "List pins",
        errors=_ORDER_ERRORS, source="url",
    ),
    Route(
        "GET", "/events", orders.events, order_models.EventsRequest, order_models.EventsReply,
        "List operations, the latest first",
        source="url",
    ),
    Route(
        "GET", "/events/{event_id}", orders.event, order_models.EventRequest,
        order_models.EventReply,
        "Tell how far an operation has come, or how it ended",
        errors=(404,), source="url",
    ),
    Route(
        "POST", "/events/{event_id}/cancel", orders.cancel, order_models.EventRequest,
        order_models.EventReply,
        "Stop an operation",
        errors=(404, 409), source="url",
    ),
    Route(
        "POST", "/check_finish", orders.check_finish, order_models.EventRequest,
        order_models.CheckFinishReply,
        "Tell the state of an operation",
        errors=(404,),
    ),
    Route(
        "GET", "/healthz", operations.healthz, None, models.HealthzReply,
        "Say that the controller serves",
        open=True,
    ),
    Route(
        "GET", "/metrics", operations.metrics, None, "text/plain",
        "Metrics of controller and frontend for Prometheus",
    ),
    Route(
        "GET", "/openapi.json", operations.openapi, None, "application/json",
        "This document",
    ),
)  # fmt: skip


class Router:
    """Finds the route for a method and a path."""

    def __init__(self, routes: Sequence[Route[Any]] = ROUTES) -> None:
        self._by_path: dict[str, dict[str, Route[Any]]] = {}
        for route in routes:
            self._by_path.setdefault(route.path, {})[route.method] = route
            if route.method == "GET":
                self._by_path[route.path]["HEAD"] = route
        self._patterns = [path for path in self._by_path if "{" in path]
        self._known = ", ".join(f"{route.method} {route.path}" for route in routes)

    def find(self, method: str, path: str) -> Found:
        """Raises ApiError 404, listing the routes, or 405 with ``Allow``."""
        names: Mapping[str, str] = {}
        methods = self._by_path.get(path)
        if methods is None or "{" in path:
            methods, names = self._match(path)
        if methods is None:
            raise ApiError(
                404, "unknown_route", f"no route {clip(path)!r}", hint=f"Known: {self._known}"
            )
        route = methods.get(method)
        if route is None:
            allowed = ", ".join(methods)
            raise ApiError(
                405,
                "method_not_allowed",
                f"{clip(path)} does not answer {clip(method)}",
                hint=f"Allowed: {allowed}",
                headers={"Allow": allowed},
            )
        return Found(route, names)

    def _match(self, path: str) -> tuple[dict[str, Route[Any]] | None, Mapping[str, str]]:
        """Part by part, with paths that have names in them."""
        parts = path.split("/")
        for pattern in self._patterns:
            wanted = pattern.split("/")
            if len(wanted) == len(parts) and all(
                given == want or (want.startswith("{") and given)
                for given, want in zip(parts, wanted, strict=True)
            ):
                named = zip(wanted, parts, strict=True)
                return self._by_path[pattern], {
                    want[1:-1]: given for want, given in named if want.startswith("{")
                }
        return None, {}
