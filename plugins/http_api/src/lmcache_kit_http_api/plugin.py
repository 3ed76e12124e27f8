"""What this distribution offers. Imports nothing heavy."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import FrontendSpec


@hookimpl
def register_frontends() -> list[FrontendSpec]:
    """The frontend ``http``."""
    return [
        FrontendSpec(
            name="http",
            target="lmcache_kit_http_api.frontend:HttpFrontend",
            config="lmcache_kit_http_api.options:HttpOptions",
            summary="REST over HTTP, with OpenAPI and Prometheus metrics",
        )
    ]
