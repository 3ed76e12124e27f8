"""The one table of routes. It drives routing, validation and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from lmcache_kit_http_api import models, operations
from lmcache_kit_http_api.operations import Raw, Service
from lmcache_kit_http_api.problems import ApiError, clip

_Q = TypeVar("_Q")

Answer: TypeAlias = models.Reply | Raw


@dataclass(frozen=True, slots=True)
class Route(Generic[_Q]):
    """``request``: the model of the JSON body, None for a route that reads no body. ``reply``: a
    model, or the content type of a document. ``errors``: statuses beyond those that every route
    may answer. ``open``: served without a token.
    """

    method: str
    path: str
    operation: Callable[[Service, _Q], Answer | Coroutine[Any, Any, Answer]]
    request: type[_Q] | None
    reply: type[models.Reply] | str
    summary: str
    errors: tuple[int, ...] = ()
    open: bool = False


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
        self._known = ", ".join(f"{route.method} {route.path}" for route in routes)

    def find(self, method: str, path: str) -> Route[Any]:
        """Raises ApiError 404, listing the routes, or 405 with ``Allow``."""
        methods = self._by_path.get(path)
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
                f"{path} does not answer {clip(method)}",
                hint=f"Allowed: {allowed}",
                headers={"Allow": allowed},
            )
        return route
