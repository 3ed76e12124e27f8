"""Routes of plugins: imported and checked, for any frontend to serve."""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any, cast

from pydantic import BaseModel

from lmcache_kit.errors import DuplicateName
from lmcache_kit.interfaces.routes import PluginRoute
from lmcache_kit.plugins.records import Failure, Offer, Raised, attempt
from lmcache_kit.plugins.registry import Plugins, attribute
from lmcache_kit.specs import RouteSpec

METHODS = ("GET", "POST", "PUT", "DELETE")

_PATH = re.compile(r"(/([\w.~-]+|\{[a-z_]\w*\}))+", flags=re.ASCII)
_NAME = re.compile(r"\{(\w+)\}")


def load_routes(plugins: Plugins) -> list[PluginRoute]:
    """Load every route that plugins offer. One that cannot be served is left out, with a Failure
    of its plugin."""
    routes = []
    for offer in plugins.specs("route"):
        loaded = attempt(partial(load_route, plugins, offer))
        if not isinstance(loaded, Raised):
            routes.append(loaded)
        elif not isinstance(loaded.error, DuplicateName):  # which is a Failure already
            error = f"route {offer.spec.name!r}: {loaded}"
            owner = offer.plugin
            plugins.report(Failure(owner.name, owner.distribution, "register_routes", error))
    return routes


def load_route(plugins: Plugins, offer: Offer) -> PluginRoute:
    """Import and check one route.

    Raises ValueError or TypeError that says what is wrong with its declaration, and as
    :meth:`Plugins.resolve` does.
    """
    spec = cast("RouteSpec", offer.spec)
    handler = plugins.resolve("route", spec.name)
    if not inspect.iscoroutinefunction(handler):
        raise TypeError(f"{spec.target} is no 'async def'")
    request = _model(spec.request) if spec.request else None
    route = PluginRoute(
        name=spec.name,
        method=spec.method,
        path=spec.path,
        handler=handler,
        request=request,
        reply=_model(spec.reply),
        summary=spec.summary,
        plugin=offer.plugin.name,
        distribution=offer.plugin.distribution,
    )
    _check_url(route)
    return route


def _model(path: str) -> type[BaseModel]:
    """Import a pydantic model that can be described to clients."""
    model: Any = attribute(path)
    if not isinstance(model, type) or not issubclass(model, BaseModel):
        raise TypeError(f"{path} is no pydantic model")
    model.model_json_schema()
    return model


def _check_url(route: PluginRoute) -> None:
    if route.method not in METHODS:
        raise ValueError(f"method {route.method!r} is none of {', '.join(METHODS)}")
    if not _PATH.fullmatch(route.path):
        raise ValueError(f"{route.path!r} is no path such as '/tenants/{{name}}'")
    names = _NAME.findall(route.path)
    fields = route.request.model_fields if route.request else {}
    known = {field.alias or name for name, field in fields.items()}
    for name in names:
        if name not in known or names.count(name) > 1:
            raise ValueError(f"{name!r} in {route.path!r} is no field of the request, or not once")
