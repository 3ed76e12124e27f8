"""The server of :mod:`~lmcache_kit.protocol.local`, on a Unix socket, for one engine.

    accepted -> Hello within HELLO_TIMEOUT_S -> served -> lost

A connection owns its leases and unfinished stores: they end with it, however it ends. Whatever it
sends, at worst it ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.errors import KitError, ProtocolError
from lmcache_kit.process import lookups, paths
from lmcache_kit.protocol import local as protocol
from lmcache_kit.protocol.framing import FrameBuffer, version_mismatch
from lmcache_kit.protocol.local import MAX_FRAME_BYTES, Failed, Hello, Stats, Welcome

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.records import Match
    from lmcache_kit.interfaces import MemoryBackend
    from lmcache_kit.keys import Namespace

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 64 * 1024
MAX_CONNECTIONS = 1024
EXPIRE_EVERY_S = 1.0
FIRST_CLIENT_S = 5.0
"""A spawned process waits at least this long for the client that it was started for."""


class CacheServer:
    """Serves one engine to the clients of a listening socket.

    ``linger_s`` is how long to run without a client; None for ever. ``settings`` is the digest of
    those it was started with (see :class:`~lmcache_kit.protocol.local.Hello`). ``more_stats``
    adds to the figures.

    ``on_hello`` is called for each client, ``on_namespace`` for each base namespace that one comes
    to use, with those of the other clients; both on the server's thread.
    """

    def __init__(
        self,
        engine: CacheEngine,
        memory: MemoryBackend,
        *,
        instance_id: str,
        incarnation: str,
        linger_s: float | None = None,
        settings: str = "",
        on_hello: Callable[[Hello], None] | None = None,
        on_namespace: Callable[[Namespace, set[Namespace]], None] | None = None,
        more_stats: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.engine = engine
        self.memory = memory
        self.instance_id = instance_id
        self.incarnation = incarnation
        self.linger_s = linger_s
        self.settings = settings
        self.on_hello = on_hello or (lambda _: None)
        self.on_namespace = on_namespace or (lambda *_: None)
        self.more_stats = more_stats
        self.counters: dict[str, int] = dict.fromkeys(
            ("connections_total", "protocol_errors_total", "internal_errors_total"), 0
        )
        self.why_ended = ""
        self._connections: set[_Connection] = set()
        self._clients: set[_Connection] = set()
        self._linger: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event

    @property
    def clients(self) -> int:
        """Connections that have said Hello."""
        return len(self._clients)

    async def serve(
        self, listener: socket.socket, on_ready: Callable[[], None] | None = None
    ) -> None:
        """Serve until :meth:`stop`, or until there was no client for ``linger_s``.

        Owns ``listener`` from here on; it is closed, and its path gone, before clients are.
        """
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        path = listener.getsockname()
        server = await self._loop.create_unix_server(lambda: _Connection(self), sock=listener)
        expiry = asyncio.create_task(self._expire_leases())
        try:
            if self.linger_s is not None:
                self._wait_for_client(max(self.linger_s, FIRST_CLIENT_S))
            if on_ready:
                on_ready()
            await self._ended.wait()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            server.close()
            expiry.cancel()
            await asyncio.sleep(0)  # what was accepted just now becomes a connection
            for connection in tuple(self._connections):
                connection.close()
            await asyncio.sleep(0)  # each is lost, and what it owned is released

    def stop(self, why: str = "stopped") -> None:
        """End :meth:`serve`; to be called on its thread."""
        if not self._ended.is_set():
            self.why_ended = why
            self._ended.set()

    def stop_from_thread(self) -> None:
        """End :meth:`serve`; from any thread, at any time."""
        if self._loop is not None:
            lookups.soon(self._loop, self.stop)

    def welcome(self, connection: _Connection, hello: Hello) -> Welcome | Failed:
        """Accept or refuse a client."""
        if self._ended.is_set():
            return Failed("this cache process is ending")
        if why := version_mismatch(hello.version, protocol.VERSION):
            return Failed(why)
        if hello.instance_id != self.instance_id:
            return Failed(
                f"this cache process serves instance {self.instance_id!r}, "
                f"not {hello.instance_id!r}"
            )
        if hello.settings and self.settings and hello.settings != self.settings:
            if self.linger_s is not None and not self._clients:
                self.stop("a client came with other settings")
                return Failed("this cache process ran with other settings and makes room")
            logger.warning(
                "%s %d joins with other settings than this cache process runs with; "
                "these stay as long as it has clients",
                hello.role,
                hello.pid,
            )
        if self._linger:
            self._linger.cancel()
            self._linger = None
        self._clients.add(connection)
        self.on_hello(hello)
        if hello.namespace is not None:
            self.use(connection, hello.namespace)
        return Welcome(
            incarnation=self.incarnation,
            location=self.engine.location,
            memory_bytes=self.memory.usage().capacity_bytes,
            pid=os.getpid(),
        )

    def use(self, connection: _Connection, namespace: Namespace) -> None:
        """Note that a client stores under this base namespace from now on."""
        connection.namespace = namespace
        others = {each.namespace for each in self._clients if each is not connection}
        self.on_namespace(namespace, {each for each in others if each is not None})

    def stats(self) -> Stats:
        """Return the metrics of the engine, its tiers and the server."""
        return Stats(
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            pid=os.getpid(),
            location=self.engine.location,
            values={
                **self.engine.stats(),
                **self.counters,
                **self.more_stats(),
                "clients": len(self._clients),
            },
            lower_tiers=self.engine.lower_tiers.stats() if self.engine.lower_tiers else {},
            namespaces=tuple(
                dict.fromkeys(each.namespace for each in self._clients if each.namespace)
            ),
        )

    def opened(self, connection: _Connection) -> bool:
        """Register a connection; False when there are too many."""
        self.counters["connections_total"] += 1
        self._connections.add(connection)
        return len(self._connections) <= MAX_CONNECTIONS

    def lost(self, connection: _Connection) -> None:
        """Drop a lost connection, and what it owned."""
        self._connections.discard(connection)
        if connection not in self._clients:
            return
        self._clients.remove(connection)
        self.engine.drop_owner(connection)
        if not self._clients and self.linger_s is not None:
            self._wait_for_client(self.linger_s)

    def _wait_for_client(self, seconds: float) -> None:
        assert self._loop is not None
        why = f"no client for {seconds:g} s"
        self._linger = self._loop.call_later(seconds, self.stop, why)

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            if expired := self.engine.expire():
                logger.warning("%d leases reached their time to live", expired)


_Simple: TypeAlias = (
    protocol.Hello | protocol.Allocate | protocol.Commit | protocol.Abandon | protocol.Release
    | protocol.ReportCorrupt | protocol.UseNamespace | protocol.GetStats
)  # fmt: skip
"""Requests other than lookups, which are answered at once."""


class _Connection(asyncio.Protocol):
    """One client, and the owner of its leases and stores."""

    _ids = itertools.count(1)

    def __init__(self, server: CacheServer) -> None:
        self.namespace: Namespace | None = None
        self._server = server
        self._name = f"connection {next(self._ids)}"
        self._hello: Hello | None = None
        self._received = FrameBuffer()
        self._paused = False
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        uid = paths.peer_uid(transport.get_extra_info("socket"))
        if not self._server.opened(self):
            self._refuse(f"more than {MAX_CONNECTIONS} connections")
        elif uid != os.getuid():
            self._refuse(f"it belongs to user {uid}")
        else:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(
                HELLO_TIMEOUT_S, self._refuse, f"no Hello within {HELLO_TIMEOUT_S:g} s"
            )

    def data_received(self, data: bytes) -> None:
        self._received.feed(data)
        self._serve_received()

    def eof_received(self) -> bool:
        if self._received and not self._transport.is_closing():
            self._refuse("it ended inside a frame")
        return False

    def connection_lost(self, _: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._server.lost(self)
        if self._hello:
            logger.debug("%s has gone", self._name)

    def pause_writing(self) -> None:
        # A client that does not read its answers is not served until it does.
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._transport.resume_reading()
        self._serve_received()

    def close(self) -> None:
        """Close after what is queued has been sent."""
        self._transport.close()

    def _serve_received(self) -> None:
        try:
            while not (self._paused or self._transport.is_closing()):
                limit = MAX_HELLO_BYTES if self._hello is None else MAX_FRAME_BYTES
                body = self._received.next_body(limit)
                if body is None:
                    break
                self._answer(*protocol.decode_request(body))
        except ProtocolError as error:
            self._refuse(str(error))

    def _answer(self, request_id: int, request: protocol.Request) -> None:
        if self._hello is None:
            if not isinstance(request, Hello):
                raise ProtocolError(f"{type(request).__name__} came before Hello")
            self._greet(request_id, request)
            return
        answer: protocol.Answer | None
        try:
            if isinstance(request, protocol.Lookup):
                answer = self._look_up(request_id, request)
            else:
                answer = self._serve(request, self._hello)
        except (KitError, ValueError) as error:
            answer = Failed(str(error))
        except Exception as error:  # a request must not end the process that serves all others
            self._server.counters["internal_errors_total"] += 1
            logger.exception("%s: %s failed", self._name, type(request).__name__)
            answer = Failed(f"internal error: {type(error).__name__}")
        if answer is not None:
            self._transport.write(protocol.encode(request_id, answer))

    def _look_up(self, request_id: int, request: protocol.Lookup) -> protocol.Found | None:
        """Return None when the answer is sent later."""

        def answer(match: Match) -> None:
            if not self._transport.is_closing():
                self._transport.write(protocol.encode(request_id, self._found(match)))

        match = lookups.look_up(self._server.engine, request, self, answer)
        return None if match is None else self._found(match)

    def _found(self, match: Match) -> protocol.Found:
        return protocol.Found(match.lease, self._server.incarnation, match.chunks)

    def _greet(self, request_id: int, hello: Hello) -> None:
        answer = self._server.welcome(self, hello)
        frame = protocol.encode(request_id, answer)
        if isinstance(answer, Failed):
            logger.warning("%s refused: %s", self._name, answer.message)
            self._transport.write(frame)
            self._transport.close()
            return
        if self._deadline:
            self._deadline.cancel()
        self._hello = hello
        self._name = f"{hello.role} {hello.pid} (rank {hello.rank})"
        # Nothing was written before, so a frame this small goes out at once, with the descriptor.
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as raw:
            socket.send_fds(raw, [frame], [self._server.memory.fd])
        logger.debug("%s has come", self._name)

    def _serve(self, request: _Simple, hello: Hello) -> protocol.Answer:
        engine = self._server.engine
        answer: protocol.Answer
        match request:
            case protocol.Allocate():
                grants = engine.allocate(
                    request.namespace,
                    request.rank,
                    request.world_size,
                    request.chunk_size,
                    request.items,
                    self,
                    RankLayout(hello.layout, hello.rope, hello.first_head)
                    if hello.layout
                    else None,
                )
                answer = protocol.Allocated(tuple(grants))
            case protocol.Commit():
                answer = protocol.Done(engine.commit(request.written, self))
            case protocol.Abandon():
                answer = protocol.Done(engine.abandon(request.tickets, self))
            case protocol.Release():
                answer = protocol.Done(int(engine.release(request.lease, request.rank)))
            case protocol.ReportCorrupt():
                logger.warning("%s found a corrupt chunk %s", self._name, request.key.hex())
                answer = protocol.Done(int(engine.drop_corrupt(request.key)))
            case protocol.UseNamespace():
                self._server.use(self, request.namespace)
                answer = protocol.Done()
            case protocol.GetStats():
                answer = self._server.stats()
            case Hello():
                raise ProtocolError(f"{hello.role} {hello.pid} said Hello twice")
        return answer

    def _refuse(self, why: str) -> None:
        self._server.counters["protocol_errors_total"] += 1
        logger.warning("%s closed: %s", self._name, why)
        self._transport.abort()
