"""What every request passes on its way to a handler: who may call, errors, metrics.

One aiohttp middleware does all three, as each middleware costs a short request several percent of
its processor time.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from lmcache_kit_http_api.errors import ApiError, clip, from_exception
from lmcache_kit_http_api.hosts import HostCheck
from lmcache_kit_http_api.metrics import HttpMetrics
from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.routes import Route

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

_HINT = "Send the header 'Authorization: Bearer <token>'"


def guard(
    served: Mapping[web.AbstractRoute, Route], metrics: HttpMetrics, options: HttpOptions
) -> Middleware:
    """Admit a request, answer every exception in the one shape of errors, and count it.

    ``served``: the entries of aiohttp's router that stand for a route of ours. Only an open route
    is served to everyone; strangers do not learn which routes there are.
    """
    token = options.token.get_secret_value().encode() if options.token else None
    # A web page that has no token gains nothing by another name for this server.
    check = HostCheck((options.host, *options.allowed_hosts))
    hosts = check if token is None or options.allowed_hosts else None

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        begun = time.perf_counter()
        route = served.get(request.match_info.route)
        response: web.StreamResponse
        try:
            if route is None or not route.open:
                if hosts is not None:
                    _check_host(request, hosts)
                _admit(request, token)
            response = await handler(request)
        # The boundary: whatever a handler raises, the client gets a reply in our shape.
        except Exception as error:  # noqa: BLE001
            response = from_exception(error).response()
        metrics.answered(route, response.status, time.perf_counter() - begun)
        return response

    return guarded


def _check_host(request: web.Request, hosts: HostCheck) -> None:
    """Raise ApiError 403 for a request that was meant for a host of another name."""
    given = request.headers.get(hdrs.HOST)
    if given and not hosts.accepts(given):
        raise ApiError(
            403,
            "foreign_host",
            f"this server is not called {clip(given)!r}",
            hint=f"Known: {clip(', '.join(hosts.names))}, and any IP address; "
            "add names with --frontend-option http.allowed_hosts=NAME,NAME",
        )


def _admit(request: web.Request, expected: bytes | None) -> None:
    """Raise ApiError 401 without the token that is expected, 403 with a wrong one.

    Without a configured token only programs may call: a page in a browser on this machine could
    otherwise reach a loopback address on behalf of whoever wrote the page.
    """
    if expected is None:
        if hdrs.ORIGIN in request.headers:
            raise ApiError(
                403,
                "cross_origin",
                "requests from web pages are not answered without a token",
                hint="Start the controller with a token, or call from outside a browser",
            )
        return
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
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
