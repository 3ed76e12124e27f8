"""What every request passes before its handler: metrics, errors, and who may call."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from aiohttp import hdrs, web

from lmcache_kit_http_api.errors import ApiError, from_exception
from lmcache_kit_http_api.metrics import HttpMetrics
from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.routes import Route

Endpoint: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware: TypeAlias = Callable[[web.Request, Endpoint], Awaitable[web.StreamResponse]]
Served: TypeAlias = Mapping[web.AbstractRoute, Route]
"""The entries of aiohttp's router that stand for a route of ours."""

_HINT = "Send the header 'Authorization: Bearer <token>'"


def measured(served: Served, metrics: HttpMetrics) -> Middleware:
    """Count requests and their time, by route and status."""

    @web.middleware
    async def measure(request: web.Request, handler: Endpoint) -> web.StreamResponse:
        begun = time.perf_counter()
        response = await handler(request)
        metrics.answered(
            served.get(request.match_info.route), response.status, time.perf_counter() - begun
        )
        return response

    return measure


def with_errors() -> Middleware:
    """Answer every exception in the one shape of errors."""

    @web.middleware
    async def convert(request: web.Request, handler: Endpoint) -> web.StreamResponse:
        try:
            return await handler(request)
        # The boundary: whatever a handler raises, the client gets a reply in our shape.
        except Exception as error:  # noqa: BLE001
            return from_exception(error).response()

    return convert


def admission(served: Served, options: HttpOptions) -> Middleware:
    """Refuse callers without the token, and web pages where no token is configured.

    A page in a browser on this machine could otherwise reach a loopback address. Strangers do not
    learn which routes there are: only an open route is served to everyone.
    """
    token = options.token.get_secret_value().encode() if options.token else None

    @web.middleware
    async def admit(request: web.Request, handler: Endpoint) -> web.StreamResponse:
        route = served.get(request.match_info.route)
        if route is None or not route.open:
            if token is not None:
                _check_token(request.headers.get(hdrs.AUTHORIZATION, ""), token)
            elif hdrs.ORIGIN in request.headers:
                raise ApiError(
                    403,
                    "cross_origin",
                    "requests from web pages are not answered without a token",
                    hint="Start the controller with a token, or call from outside a browser",
                )
        return await handler(request)

    return admit


def _check_token(authorization: str, expected: bytes) -> None:
    """Raise ApiError 401 without a bearer token, 403 with a wrong one."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise ApiError(
            401,
            "token_missing",
            "this controller asks for a token",
            hint=_HINT,
            headers={hdrs.WWW_AUTHENTICATE: 'Bearer realm="lmcache-kit"'},
        )
    if not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), expected):
        raise ApiError(403, "token_wrong", "the token is not the right one", hint=_HINT)
