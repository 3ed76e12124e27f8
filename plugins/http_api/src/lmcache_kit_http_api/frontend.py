"""The frontend: an aiohttp server whose every answer passes one function."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import HttpVersion11, hdrs, web

from lmcache_kit.interfaces.frontend import ControllerAPI, Frontend
from lmcache_kit_http_api import listen, openapi
from lmcache_kit_http_api.metrics import HttpMetrics
from lmcache_kit_http_api.operations import Raw, Service
from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.parsing import parse, parse_url
from lmcache_kit_http_api.problems import ApiError, clip, from_exception, too_large
from lmcache_kit_http_api.routes import Found, Route, Router
from lmcache_kit_http_api.security import admit

_NO_ACCESS_LOG: Any = None
_LINGER_S = 2.0
"""How long the rest of a refused body is read, so that the client sees the answer."""


class HttpFrontend(Frontend):
    """REST on a TCP port.

    >>> frontend = HttpFrontend(controller, HttpOptions(port=9000))   # doctest: +SKIP
    >>> await frontend.start()                                        # doctest: +SKIP
    """

    def __init__(self, controller: ControllerAPI, options: HttpOptions) -> None:
        """Raises ConfigError when anyone on the network could call without a token."""
        options.refuse_open_door()
        self._options = options
        self._metrics = HttpMetrics(controller)
        self._service = Service(
            controller,
            self._metrics.render,
            openapi.render,
            answer_within_s=0.9 * options.request_timeout_s,
        )
        self._router = Router()
        self._connections: web.Server | None = None
        self._servers: list[asyncio.Server] = []
        self._endpoints: tuple[str, ...] = ()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """One URL, with the port that was chosen for port 0."""
        return self._endpoints

    async def start(self) -> None:
        """Begin to serve. Raises OSError with the address when it is taken."""
        sockets = listen.open_sockets(self._options.host, self._options.port)
        loop = asyncio.get_running_loop()
        connections = web.Server(self._serve, request_factory=self._request)

        def protocol() -> _Protocol:
            return _Protocol(
                connections, loop=loop, access_log=_NO_ACCESS_LOG, lingering_time=_LINGER_S
            )

        for listening in sockets:
            self._servers.append(await loop.create_server(protocol, sock=listening))
        self._connections = connections
        name = "localhost" if self._options.host == "localhost" else ""
        self._endpoints = (listen.url(sockets[0], name),)

    async def stop(self) -> None:
        """Take no more connections; give requests in flight ``shutdown_grace_s`` to finish."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.pre_shutdown()
            # aiohttp waits this long twice: for handlers, then for what they were reading.
            await connections.shutdown(self._options.shutdown_grace_s / 2)

    def _request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            asyncio.get_running_loop(),
            client_max_size=self._options.max_body_bytes,
        )

    async def _serve(self, request: web.BaseRequest) -> web.Response:
        begun = time.perf_counter()
        label = ("other", "other")
        try:
            route, names = self._admitted(request)
            label = (route.method, route.path)
            response = await self._answer(route, names, request)
        # The boundary: whatever an operation raises, the client gets an answer in our shape.
        except Exception as error:  # noqa: BLE001
            response = from_exception(error).response()
        response.headers[hdrs.SERVER] = "lmcache-kit"
        self._metrics.answered(*label, response.status, time.perf_counter() - begun)
        return response

    def _admitted(self, request: web.BaseRequest) -> Found:
        """Strangers learn nothing of which routes there are."""
        try:
            found = self._router.find(request.method, request.path)
        except ApiError:
            admit(request, self._options)
            raise
        if not found.route.open:
            admit(request, self._options)
        return found

    async def _answer(
        self, route: Route[Any], names: Mapping[str, str], request: web.BaseRequest
    ) -> web.Response:
        asked = None
        if route.request is not None and route.source == "url":
            asked = parse_url(route.request, names, request.query)
        elif route.request is not None:
            body = await self._body(request)
            asked = parse(route.request, body, max_tokens=self._options.max_tokens)
        reply = route.operation(self._service, asked)
        if asyncio.iscoroutine(reply):
            async with asyncio.timeout(self._options.request_timeout_s):
                reply = await reply
        if isinstance(reply, Raw):
            return web.Response(body=reply.body, headers={hdrs.CONTENT_TYPE: reply.content_type})
        return web.Response(body=reply.model_dump_json().encode(), content_type="application/json")

    async def _body(self, request: web.BaseRequest) -> bytes:
        if request.query_string:
            raise ApiError(
                422,
                "invalid_request",
                "query parameters are not read here",
                hint="Put them into the JSON body",
            )
        limit = self._options.max_body_bytes
        if (request.content_length or 0) > limit:
            raise too_large(limit)
        await _expected(request)
        try:
            # A timer costs more than the rest of a short request, and most bodies are here already.
            if request.content.is_eof():
                return await request.read()
            async with asyncio.timeout(self._options.request_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large(limit) from None
        except TimeoutError:
            raise ApiError(
                408, "body_timeout", "the body did not arrive in time", hint="Send it again"
            ) from None


async def _expected(request: web.BaseRequest) -> None:
    """Clients with a large body wait for a word before they send it."""
    expected = request.headers.get(hdrs.EXPECT)
    if expected is None or request.version < HttpVersion11:
        return
    if expected.lower() != "100-continue":
        raise ApiError(417, "unknown_expectation", f"cannot do 'Expect: {clip(expected)}'")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


class _Protocol(web.RequestHandler):
    """aiohttp's own, except that what is not even HTTP is answered in our shape."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called by aiohttp for what its parser refuses."""
        if exc is not None and status >= 500:
            problem = from_exception(exc)
        else:
            problem = ApiError(
                status, "bad_request", "this is not a well-formed HTTP request", hint=""
            )
        response = problem.response()
        response.force_close()
        return response
