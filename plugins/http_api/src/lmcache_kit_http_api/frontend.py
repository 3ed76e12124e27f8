"""The frontend: listening sockets, and the life of the application behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from lmcache_kit.interfaces.frontend import ControllerAPI, Frontend
from lmcache_kit.interfaces.routes import PluginRoute
from lmcache_kit_http_api import listen
from lmcache_kit_http_api.app import make_app
from lmcache_kit_http_api.errors import ApiError, from_exception
from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.routes import ROUTES, with_plugin_routes

_BACKLOG = 1024
_NO_ACCESS_LOG: Any = None
_LINGER_S = 2.0
"""Time in which the rest of a refused body is read, so that the client sees the answer."""


class HttpFrontend(Frontend):
    """Serves REST on a TCP port.

    >>> frontend = HttpFrontend(controller, HttpOptions(port=9000))   # doctest: +SKIP
    >>> await frontend.start()                                        # doctest: +SKIP
    """

    def __init__(self, controller: ControllerAPI, options: HttpOptions) -> None:
        """Raises ConfigError when anyone on the network could call without a token."""
        options.refuse_open_door()
        self._controller = controller
        self._options = options
        self._routes = ROUTES
        self._runner: web.AppRunner | None = None
        self._servers: list[asyncio.Server] = []
        self._endpoints: tuple[str, ...] = ()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """One URL, with the port that was chosen for port 0."""
        return self._endpoints

    def add_routes(self, routes: Sequence[PluginRoute]) -> None:
        """Serve the routes of plugins too. Raises DuplicateName where a path collides."""
        self._routes = with_plugin_routes(routes)

    async def start(self) -> None:
        """Start to serve. Raises OSError with the address when it is taken."""
        sockets = listen.open_sockets(self._options.host, self._options.port)
        self._runner = web.AppRunner(
            make_app(self._controller, self._options, self._routes),
            # aiohttp waits this long twice: for handlers, then for what they were reading.
            shutdown_timeout=self._options.shutdown_grace_s / 2,
        )
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        for listening in sockets:
            server = await loop.create_server(self._protocol, sock=listening, backlog=_BACKLOG)
            self._servers.append(server)
        name = "localhost" if self._options.host == "localhost" else ""
        self._endpoints = (listen.url(sockets[0], name),)

    async def stop(self) -> None:
        """Take no more connections; give requests in flight ``shutdown_grace_s`` to finish."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def _protocol(self) -> _Protocol:
        """Make the protocol of one connection, as aiohttp's own sites do."""
        if self._runner is None or self._runner.server is None:
            raise RuntimeError("the frontend has stopped")
        return _Protocol(
            self._runner.server,
            loop=asyncio.get_running_loop(),
            access_log=_NO_ACCESS_LOG,
            keepalive_timeout=self._options.idle_timeout_s,
            lingering_time=_LINGER_S,
        )


class _Protocol(web.RequestHandler):
    """aiohttp's own, except that bytes that are no HTTP are answered in the shape of errors."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp's parser refuses."""
        if exc is not None and status >= 500:
            error = from_exception(exc)
        else:
            error = ApiError(status, "bad_request", "this is not a well-formed HTTP request")
        response = error.response()
        response.force_close()
        return response
