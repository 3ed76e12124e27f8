"""The controller: sockets around the registry, instances and operations."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import zmq
import zmq.asyncio

from lmcache_kit.controller.commands import Commands
from lmcache_kit.controller.instances import Instances
from lmcache_kit.controller.metrics import CONTROLLER
from lmcache_kit.controller.operations import Operations
from lmcache_kit.controller.registry import Connection, Registry
from lmcache_kit.errors import ConfigError, ProtocolError
from lmcache_kit.metrics import MetricSet
from lmcache_kit.protocol.address import bind_url
from lmcache_kit.protocol.control import (
    MAX_FRAME_BYTES,
    FromController,
    OperationReport,
    Register,
    Result,
    decode_from_agent,
    encode,
)
from lmcache_kit.protocol.zmq_auth import ControllerKeys, ZapAuthenticator

log = logging.getLogger(__name__)

_TICK_S = 0.1
_TURN_S = 0.002
_QUEUED_MESSAGES = 64


class _Connection(NamedTuple):
    """A connection: the number of its port, and the routing id that ZMQ gave it there."""

    port: int
    routing_id: bytes


class Controller:
    """Serves cache processes on ``ports`` of ``host``; all ports speak the same wire.

    A :class:`~lmcache_kit.interfaces.frontend.ControllerAPI`: frontends use ``instances`` and
    ``operations`` directly. Port 0 takes a free one, see :attr:`endpoints`. With ``keys`` only
    workers that these know may connect, and connections are encrypted. Everything runs on the
    event loop that called :meth:`start`.
    """

    def __init__(
        self,
        host: str,
        ports: Sequence[int],
        *,
        health_timeout_s: float = 2.0,
        keys: ControllerKeys | None = None,
        registry: Registry | None = None,
    ) -> None:
        self._host = host
        self._ports = tuple(dict.fromkeys(ports))
        self._registry = registry or Registry()
        self._counts = self._registry.counts
        self._commands = Commands(self._counts, self._send)
        self.instances = Instances(
            self._registry, self._commands, health_timeout_s=health_timeout_s
        )
        self.operations = Operations(self._registry, self._send)
        self._keys = keys
        self._authenticator: ZapAuthenticator | None = None
        self._context: zmq.asyncio.Context | None = None
        self._sockets: list[zmq.asyncio.Socket] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Addresses as ``tcp://address:port``; empty unless started."""
        return tuple(
            each.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") for each in self._sockets
        )

    async def start(self) -> None:
        """Listen. Raise ConfigError for an address or port that is not available."""
        self._context = zmq.asyncio.Context()
        try:
            if self._keys:
                self._authenticator = ZapAuthenticator(self._context, self._keys, self._counts)
            for port in self._ports:
                self._sockets.append(self._listen(self._context, port))
        except BaseException:
            await self.stop()
            raise
        serving = [self._serve(at, each) for at, each in enumerate(self._sockets)]
        self._tasks = [asyncio.create_task(work) for work in (*serving, self._tick())]

    async def stop(self) -> None:
        """Stop listening, and fail what waits for a cache process. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.operations.close()
        self._commands.close()
        if self._authenticator:
            await self._authenticator.stop()
        for each in self._sockets:
            each.close(linger=0)
        if self._context is not None:
            self._context.term()
        self._tasks, self._sockets, self._context, self._authenticator = [], [], None, None

    @property
    def metrics(self) -> MetricSet:
        """Declarations of what :meth:`counters` returns."""
        return CONTROLLER

    def counters(self) -> Mapping[str, float]:
        """Return counters since the start, and gauges of the present."""
        processes = self._registry.processes()
        index = self._registry.index
        return {
            **self._counts,
            "instances": float(len(processes)),
            "instances_alive": float(sum(process.alive for process in processes)),
            "workers": float(sum(len(process.registration.workers) for process in processes)),
            "namespaces": float(len(list(self._registry.namespaces()))),
            "index_keys": float(len(index)),
            "index_holders": float(index.holders),
            "index_holders_unswept": float(index.dead),
            "operations_active": float(self.operations.active),
            "commands_waiting": float(len(self._commands)),
        }

    # Sockets.

    def _listen(self, context: zmq.asyncio.Context, port: int) -> zmq.asyncio.Socket:
        """Set everything that protects a port before the port is bound."""
        made = context.socket(zmq.ROUTER)
        try:
            made.setsockopt(zmq.LINGER, 0)
            made.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            made.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
            made.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
            made.setsockopt(zmq.HANDSHAKE_IVL, 5000)
            made.setsockopt(zmq.TCP_KEEPALIVE, 1)
            made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
            made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
            made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
            if self._authenticator:
                self._authenticator.protect(made)
            url = bind_url(self._host, port)
            made.setsockopt(zmq.IPV6, int("[" in url))
            made.bind(url)
        except zmq.ZMQError as error:
            made.close(linger=0)
            raise _no_port(self._host, port, error) from None
        except BaseException:
            made.close(linger=0)
            raise
        return made

    async def _serve(self, port: int, incoming: zmq.asyncio.Socket) -> None:
        turn_ends = time.monotonic() + _TURN_S
        while True:
            try:
                self._receive(port, await incoming.recv_multipart(copy=False))
            except ProtocolError as error:
                self._counts["messages_malformed_total"] += 1
                log.debug("dropped a message: %s", error)
            except Exception:
                # One message must not end the service for all others.
                self._counts["messages_failed_total"] += 1
                log.exception("a message could not be handled and was dropped")
                await asyncio.sleep(_TURN_S)
            # Awaiting a future that is done already gives no turn to other tasks.
            if time.monotonic() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + _TURN_S

    def _receive(self, port: int, frames: list[zmq.Frame]) -> None:
        self._counts["messages_total"] += 1
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames) - 1} frames where one belongs")
        connection = _Connection(port, frames[0].bytes)
        message = decode_from_agent(frames[1].buffer)
        if isinstance(message, Result):
            self._registry.hear(connection)
            self._commands.handle(connection, message)
            return
        ip = _address(frames[1]) if isinstance(message, Register) else ""
        for to, answer in self._registry.handle(connection, message, ip):
            self._send(to, answer)
        if isinstance(message, OperationReport) and self._registry.on(connection):
            self.operations.handle(connection, message)

    def _send(self, connection: Connection, message: FromController) -> None:
        """Send without waiting. A message that the connection does not take is dropped; the next
        message of its process heals that."""
        assert isinstance(connection, _Connection)
        frames = [connection.routing_id, encode(message)]
        sent = self._sockets[connection.port].send_multipart(frames, flags=zmq.NOBLOCK)
        asyncio.ensure_future(sent).add_done_callback(_log_failure)

    async def _tick(self) -> None:
        """Expire processes and operations, and sweep the index a little at a time."""
        while True:
            self._registry.expire()
            self.operations.tick()
            busy = self._registry.index.sweep()
            await asyncio.sleep(_TURN_S if busy else _TICK_S)


def _address(frame: zmq.Frame) -> str:
    """Return the address of a frame's sender, as the socket knows it."""
    with suppress(zmq.ZMQError):
        address = frame.get("Peer-Address")
        if isinstance(address, str):
            return address
    return ""


def _log_failure(sent: asyncio.Future[zmq.MessageTracker | None]) -> None:
    """Retrieve the result of a send, since asyncio complains about results never retrieved."""
    if not sent.cancelled() and (error := sent.exception()):
        log.debug("a message was not sent: %s", error)


def _no_port(host: str, port: int, error: zmq.ZMQError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} on {host} is taken", hint="Choose another with --monitor-port"
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"port {port} on {host} is not allowed", hint="Choose another with --monitor-port"
        )
    return ConfigError(
        f"cannot listen on port {port} of {host}: {error}",
        hint="Choose an address of this machine with --host, and the port with --monitor-port",
    )
