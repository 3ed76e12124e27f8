"""The table of routes. Routing, parsing and the OpenAPI document follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lmcache_kit.errors import ControlError, DuplicateName
from lmcache_kit.interfaces.routes import PluginRoute
from lmcache_kit_http_api import handlers, models, operation_models
from lmcache_kit_http_api.errors import defect_of
from lmcache_kit_http_api.handlers import Context, Document

if TYPE_CHECKING:
    from pydantic import BaseModel

BUILT_IN = "the frontend http"

Handler: TypeAlias = Callable[[Context, Any], Any]
"""Takes the parsed request, or None; returns a reply or an awaitable of one."""


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One method of one path.

    ``path`` may have names in braces, each of which stands for one segment. ``request`` is the
    model of what is asked, or None; :attr:`in_url` says where its fields stand. ``reply`` is a
    model, or the content type of a document. ``errors`` are the statuses beyond those of every
    route. An ``open`` route needs no token. ``owner`` is who answers for it.
    """

    method: str
    path: str
    handler: Handler
    request: type[BaseModel] | None
    reply: type[BaseModel] | str
    summary: str
    errors: tuple[int, ...] = ()
    open: bool = False
    owner: str = BUILT_IN
    operation_id: str = ""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def in_url(self) -> bool:
        """Whether fields are read from path and query, and not from a JSON body."""
        return self.method in ("GET", "DELETE") or "{" in self.path

    def collides_with(self, other: Route) -> bool:
        """Whether one path can stand for both routes. One owner may give a path many methods."""
        if (self.path, self.owner) == (other.path, other.owner):
            return self.method == other.method
        ours, theirs = self.path.split("/"), other.path.split("/")
        return len(ours) == len(theirs) and all(
            mine == its or "{" in mine + its for mine, its in zip(ours, theirs, strict=True)
        )


_OPERATION_ERRORS = (404, 409, 502, 503, 504)


ROUTES: tuple[Route, ...] = (
    Route(
        "POST", "/lookup", handlers.lookup, models.LookupRequest, models.LookupReply,
        "Find who holds the KV of a prompt",
        errors=(404,),
    ),
    Route(
        "POST", "/health", handlers.health, models.HealthRequest, models.HealthReply,
        "Ask the workers of an instance whether they are well",
        errors=(404, 503, 504),
    ),
    Route(
        "POST", "/query_worker_info", handlers.query_worker_info,
        models.QueryWorkerInfoRequest, models.QueryWorkerInfoReply,
        "List the workers of one instance or of all",
        errors=(404,),
    ),
    Route(
        "POST", "/query_instance", handlers.query_instance,
        models.QueryInstanceRequest, models.QueryInstanceReply,
        "Name the instances that registered from an address",
    ),
    Route(
        "POST", "/pin", handlers.pin,
        operation_models.PinRequest, operation_models.OperationAccepted,
        "Keep what is stored of a prompt, whatever else is evicted",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "POST", "/unpin", handlers.unpin,
        operation_models.UnpinRequest, operation_models.OperationAccepted,
        "End pins",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "POST", "/clear", handlers.clear,
        operation_models.ClearRequest, operation_models.OperationAccepted,
        "Delete what is stored of a prompt and what follows it, or everything at a location",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "POST", "/compress", handlers.compress,
        operation_models.CompressRequest, operation_models.OperationAccepted,
        "Start to encode what is stored of a prompt, or everything at a location",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "POST", "/decompress", handlers.decompress,
        operation_models.DecompressRequest, operation_models.OperationAccepted,
        "Start to decode what is stored of a prompt, or everything at a location",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "POST", "/move", handlers.move,
        operation_models.MoveRequest, operation_models.OperationAccepted,
        "Start to move what is stored of a prompt, or everything at a location, to another "
        "location",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "GET", "/pins", handlers.pins,
        operation_models.PinsRequest, operation_models.PinsReply,
        "List pins",
        errors=_OPERATION_ERRORS,
    ),
    Route(
        "GET", "/events", handlers.events,
        operation_models.EventsRequest, operation_models.EventsReply,
        "List operations, the latest first",
    ),
    Route(
        "GET", "/events/{event_id}", handlers.event,
        operation_models.EventRequest, operation_models.EventReply,
        "Tell how far an operation has come, or how it ended",
        errors=(404,),
    ),
    Route(
        "POST", "/events/{event_id}/cancel", handlers.cancel,
        operation_models.EventRequest, operation_models.EventReply,
        "Stop an operation",
        errors=(404, 409),
    ),
    Route(
        "POST", "/check_finish", handlers.check_finish,
        operation_models.EventRequest, operation_models.CheckFinishReply,
        "Tell the state of an operation",
        errors=(404,),
    ),
    Route(
        "GET", "/healthz", handlers.healthz, None, models.HealthzReply,
        "Say that the controller serves",
        open=True,
    ),
    Route(
        "GET", "/metrics", handlers.metrics, None, "text/plain",
        "Metrics of controller and frontend for Prometheus",
    ),
    Route(
        "GET", "/openapi.json", handlers.openapi, None, "application/json",
        "This document",
    ),
)  # fmt: skip


def with_plugin_routes(offered: Iterable[PluginRoute]) -> tuple[Route, ...]:
    """Add the routes of plugins to the built-in ones.

    Raises DuplicateName, which names both owners, where two paths collide.
    """
    table = list(ROUTES)
    for plugin_route in offered:
        route = _from_plugin(plugin_route)
        for other in table:
            if route.collides_with(other):
                raise DuplicateName(
                    f"route {route} of {route.owner} collides with {other} of {other.owner}",
                    hint="Uninstall it, or block it with "
                    f"LMCACHE_KIT_PLUGINS=-{plugin_route.plugin}",
                )
        table.append(route)
    return tuple(table)


def _from_plugin(offered: PluginRoute) -> Route:
    owner = f"plugin {offered.plugin!r} of {offered.distribution}"
    return Route(
        offered.method,
        offered.path,
        _guarded(offered, owner),
        offered.request,
        offered.reply,
        offered.summary,
        errors=(404, 409, 502, 503, 504),
        owner=owner,
        operation_id=f"{offered.plugin}.{offered.name}",
    )


def _guarded(offered: PluginRoute, owner: str) -> Handler:
    """Answer whatever a plugin raises or returns; a defect is logged with the plugin's name."""

    async def handle(context: Context, request: BaseModel | None) -> Document:
        try:
            reply = await offered.handler(context.controller, request)
            if not isinstance(reply, offered.reply):
                raise TypeError(f"{reply!r} is no {offered.reply.__name__}")
            return Document(reply.model_dump_json().encode(), "application/json")
        except (ControlError, TimeoutError):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to plugin code
            raise defect_of(f"route {offered.name!r} of {owner}", error) from None

    return handle
