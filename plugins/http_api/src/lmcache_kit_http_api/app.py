"""The aiohttp application: routes, the middlewares around them, and bodies in and out."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, hdrs, web
from pydantic_core import to_json

from lmcache_kit.interfaces.frontend import ControllerAPI
from lmcache_kit_http_api import openapi
from lmcache_kit_http_api.errors import ApiError, clip, respond, too_large
from lmcache_kit_http_api.handlers import Context, Document
from lmcache_kit_http_api.metrics import HttpMetrics
from lmcache_kit_http_api.middlewares import guard
from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.parsing import parse, parse_url
from lmcache_kit_http_api.routes import Route

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler


def make_app(
    controller: ControllerAPI, options: HttpOptions, routes: Sequence[Route]
) -> web.Application:
    """Build the application that serves ``routes``."""
    metrics = HttpMetrics(controller)
    context = Context(
        controller,
        metrics.render,
        functools.cache(functools.partial(openapi.render, routes)),
        answer_within_s=0.9 * options.request_timeout_s,
    )
    served: dict[web.AbstractRoute, Route] = {}
    app = web.Application(
        client_max_size=options.max_body_bytes,
        middlewares=[guard(served, metrics, options)],
    )
    for path in dict.fromkeys(route.path for route in routes):
        resource = app.router.add_resource(re.sub(r"\{(\w+)\}", r"{\1:[^/]+}", path))
        for route in routes:
            if route.path != path:
                continue
            endpoint = _endpoint(route, context, options)
            for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
                entry = resource.add_route(method, endpoint, expect_handler=_expect_later)
                served[entry] = route
        allowed = ", ".join(sorted(entry.method for entry in resource))
        resource.add_route("*", _wrong_method(allowed), expect_handler=_expect_later)
    unknown = _unknown_route(routes)
    app.router.add_route("*", "/{path:.*}", unknown, expect_handler=_expect_later)
    return app


def _endpoint(route: Route, context: Context, options: HttpOptions) -> Handler:
    """Parse, call the handler and serialize its reply."""
    model = route.request
    in_url = route.in_url
    is_async = inspect.iscoroutinefunction(route.handler)
    limits = {"max_tokens": options.max_tokens}

    async def endpoint(request: web.Request) -> web.StreamResponse:
        asked = None
        if model is not None and in_url:
            asked = parse_url(model, request.match_info, request.query)
        elif model is not None:
            asked = parse(model, await _body(request, options), limits)
        if is_async:
            asking = dataclasses.replace(context, caller=request.remote or "")
            async with asyncio.timeout(options.request_timeout_s):
                reply = await route.handler(asking, asked)
        else:
            reply = route.handler(context, asked)
        if isinstance(reply, Document):
            return respond(200, reply.body, {hdrs.CONTENT_TYPE: reply.content_type})
        return respond(200, to_json(reply))

    return endpoint


async def _body(request: web.Request, options: HttpOptions) -> bytes:
    if request.query_string:
        raise ApiError(
            422,
            "invalid_request",
            "query parameters are not read here",
            hint="Put them into the JSON body",
        )
    limit = options.max_body_bytes
    if request.content.is_eof() and hdrs.EXPECT not in request.headers:
        # The usual case: the body came with the head, so that nothing needs a timer.
        body = request.content.read_nowait()
        if len(body) > limit:
            raise too_large(limit)
        return body
    if (request.content_length or 0) > limit:
        raise too_large(limit)
    await _continue(request)
    try:
        async with asyncio.timeout(options.request_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limit) from None
    except TimeoutError:
        raise ApiError(
            408, "body_timeout", "the body did not arrive in time", hint="Send it again"
        ) from None


async def _expect_later(request: web.Request) -> None:
    """Leave the header Expect to :func:`_continue`, as a caller must be admitted before."""


async def _continue(request: web.Request) -> None:
    """Tell a client that waits for it to send its body. Raises ApiError for another wish."""
    expected = request.headers.get(hdrs.EXPECT)
    if expected is None or request.version < HttpVersion11:
        return
    if expected.lower() != "100-continue":
        raise ApiError(417, "unknown_expectation", f"cannot do 'Expect: {clip(expected)}'")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # aiohttp takes a request whose output has begun for one that was answered.
    request.writer.output_size = 0


def _wrong_method(allowed: str) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise ApiError(
            405,
            "method_not_allowed",
            f"{clip(request.path)} does not answer {clip(request.method)}",
            hint=f"Allowed: {allowed}",
            headers={hdrs.ALLOW: allowed},
        )

    return refuse


def _unknown_route(routes: Sequence[Route]) -> Handler:
    known = ", ".join(map(str, routes))

    async def refuse(request: web.Request) -> web.StreamResponse:
        raise ApiError(
            404, "unknown_route", f"no route {clip(request.path)!r}", hint=f"Known: {known}"
        )

    return refuse
