"""Routes that plugins add to the controller's frontends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from lmcache_kit.interfaces.frontend import ControllerAPI

if TYPE_CHECKING:
    from pydantic import BaseModel

RouteHandler: TypeAlias = Callable[[ControllerAPI, Any], Awaitable[Any]]
"""``async def handler(controller, request)``: takes the parsed request model, or None where the
route has none, and returns the reply model. Called on the controller's event loop, which it must
not block. A :class:`~lmcache_kit.errors.ControlError` is shown to the client; any other exception
is a defect of the plugin."""


@dataclass(frozen=True, slots=True)
class PluginRoute:
    """A route of a plugin, imported and checked. ``plugin`` and ``distribution`` name its owner;
    the other fields are those of :class:`~lmcache_kit.specs.RouteSpec`."""

    name: str
    method: str
    path: str
    handler: RouteHandler
    request: type[BaseModel] | None
    reply: type[BaseModel]
    summary: str
    plugin: str
    distribution: str


@runtime_checkable
class ServesRoutes(Protocol):
    """An optional power of a frontend: to serve the routes of plugins beside its own."""

    def add_routes(self, routes: Sequence[PluginRoute]) -> None:
        """Take the routes to serve. Called once, before the start.

        Raises DuplicateName, which names both owners, for a path that is served already.
        """
        ...
