"""The controller: sockets around the registry and the index, and what frontends may ask."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import zmq
import zmq.asyncio

from lmcache_kit.controller import lookup as lookups
from lmcache_kit.controller.operations import Operations
from lmcache_kit.controller.registry import Connection, Process, Registry
from lmcache_kit.errors import ConfigError, DeadlineExceeded, NoWorker, ProtocolError, UnknownName
from lmcache_kit.interfaces.frontend import (
    EventInfo,
    LookupAnswer,
    LookupQuery,
    Operation,
    PinList,
    WorkerInfo,
)
from lmcache_kit.protocol.address import bind_url
from lmcache_kit.protocol.control import (
    MAX_FRAME_BYTES,
    Began,
    Command,
    Ended,
    FromController,
    Progressed,
    Register,
    Rejected,
    Result,
    decode_from_agent,
    encode,
)
from lmcache_kit.protocol.zmq_auth import ControllerKeys, ZapAuthenticator

log = logging.getLogger(__name__)

_TICK_S = 0.1
_TURN_S = 0.002
_QUEUED_MESSAGES = 64


class _Peer(NamedTuple):
    """A connection: which of our sockets it is on, and the routing id ZMQ gave it there."""

    port: int
    routing_id: bytes


class Controller:
    """Serves cache processes on ``ports`` of ``host``; all ports speak the same wire.

    Port 0 takes a free one, see :attr:`endpoints`. ``health_timeout_s``: how long a worker may
    take to answer. ``keys``: take in only workers that these know, and encrypt. Everything runs on
    the event loop that called :meth:`start`.
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
        self._health_timeout_s = health_timeout_s
        self._registry = registry or Registry()
        self._counts = self._registry.counts
        self._operations = Operations(self._registry, self._send)
        self._keys = keys
        self._guard: ZapAuthenticator | None = None
        self._context: zmq.asyncio.Context | None = None
        self._sockets: list[zmq.asyncio.Socket] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._correlations = itertools.count(1)
        self._waiting: dict[int, tuple[_Peer, asyncio.Future[Result]]] = {}

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens, as ``tcp://address:port``; empty unless it has started."""
        return tuple(
            each.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") for each in self._sockets
        )

    async def start(self) -> None:
        """Listen. Raises ConfigError for an address or port that cannot be had."""
        self._context = zmq.asyncio.Context()
        try:
            if self._keys:
                self._guard = ZapAuthenticator(self._context, self._keys, self._counts)
            for port in self._ports:
                self._sockets.append(self._listen(self._context, port))
        except BaseException:
            await self.stop()
            raise
        serving = [self._serve(at, each) for at, each in enumerate(self._sockets)]
        self._tasks = [asyncio.create_task(work) for work in (*serving, self._tick())]

    async def stop(self) -> None:
        """Stop listening; whoever waits for a worker is told. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._operations.close()
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(NoWorker("the controller is stopping"))
        if self._guard:
            await self._guard.stop()
        for each in self._sockets:
            each.close(linger=0)
        if self._context is not None:
            self._context.term()
        self._tasks, self._sockets, self._context, self._guard = [], [], None, None

    # What frontends ask.

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        """See :class:`~lmcache_kit.interfaces.frontend.ControllerAPI`."""
        self._counts["lookups_total"] += 1
        self._counts["lookup_tokens_total"] += len(query.tokens)
        answer = lookups.lookup(self._registry, query)
        if answer.instances:
            self._counts["lookup_hits_total"] += 1
            self._counts["lookup_hit_tokens_total"] += answer.instances[0].best.tokens
        return answer

    async def health(self, instance_id: str) -> dict[int, int]:
        """0 for each rank whose cache process answers well, 1 for one that reports an error."""
        process = self._registry.find(instance_id)
        if not process.alive:
            raise self._registry.silent(process)
        result = await self._command(process, "ping", self._health_timeout_s)
        code = 1 if result.error else 0
        return {worker.rank: code for worker in sorted(process.said.workers)}

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        """By instance and rank. Raises UnknownName for an unknown instance or worker."""
        if instance_id is None:
            processes = self._registry.processes()
        else:
            processes = [self._registry.find(instance_id)]
        infos = [info for process in processes for info in _workers(process)]
        if worker_ids is None:
            return infos
        known = sorted({info.worker_id for info in infos})
        for wanted in worker_ids:
            if wanted not in known:
                raise UnknownName("worker", str(wanted), list(map(str, known)))
        return [info for info in infos if info.worker_id in worker_ids]

    def instance_at(self, ip: str) -> str | None:
        """The one that registered last, when several came from this address."""
        at = [each for each in self._registry.processes() if ip in (each.ip, each.said.host)]
        if not at:
            return None
        return max(at, key=lambda each: (each.alive, each.registered_at)).instance_id

    async def operate(self, operation: Operation) -> EventInfo:
        """Returns when the cache process has taken it on."""
        return await self._operations.operate(operation)

    async def ended(self, event_id: str) -> EventInfo:
        """Returns when it has ended."""
        return await self._operations.ended(event_id)

    async def cancel(self, event_id: str) -> EventInfo:
        """Returns when it has ended, or after a little while."""
        return await self._operations.cancel(event_id)

    def event(self, event_id: str) -> EventInfo:
        """Raises UnknownName."""
        return self._operations.event(event_id)

    def events(self) -> list[EventInfo]:
        """The latest first."""
        return self._operations.events()

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        """Each cache process is asked."""
        return await self._operations.pins(instance_id, location)

    def counters(self) -> Mapping[str, float]:
        """Counters since the start, and gauges of what is known now."""
        processes = self._registry.processes()
        index = self._registry.index
        return {
            **self._counts,
            "instances": float(len(processes)),
            "instances_alive": float(sum(process.alive for process in processes)),
            "workers": float(sum(len(process.said.workers) for process in processes)),
            "namespaces": float(len(list(self._registry.namespaces()))),
            "index_keys": float(len(index)),
            "index_holders": float(index.holders),
            "index_holders_unswept": float(index.dead),
            "operations_active": float(self._operations.active),
            "commands_waiting": float(len(self._waiting)),
        }

    # Sockets.

    def _listen(self, context: zmq.asyncio.Context, port: int) -> zmq.asyncio.Socket:
        """All that protects a port is set here, before it is bound."""
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
            if self._guard:
                self._guard.protect(made)
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
                # Whatever one message does must not end the service for all others.
                self._counts["messages_failed_total"] += 1
                log.exception("a message could not be handled and was dropped")
                await asyncio.sleep(_TURN_S)
            # A future that is done already gives no turn to anybody else.
            if time.monotonic() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = time.monotonic() + _TURN_S

    def _receive(self, port: int, frames: list[zmq.Frame]) -> None:
        self._counts["messages_total"] += 1
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames) - 1} frames where one belongs")
        peer = _Peer(port, frames[0].bytes)
        message = decode_from_agent(frames[1].buffer)
        if isinstance(message, Result):
            self._registry.hear(peer)
            self._answered(peer, message)
            return
        ip = _address(frames[1]) if isinstance(message, Register) else ""
        for connection, answer in self._registry.handle(peer, message, ip):
            self._send(connection, answer)
        if isinstance(message, (Began, Rejected, Progressed, Ended)) and self._registry.on(peer):
            self._operations.handle(peer, message)

    def _send(self, peer: Connection, message: FromController) -> None:
        """Never waits: what a peer does not take is dropped, and the peer's next message heals."""
        assert isinstance(peer, _Peer)
        frames = [peer.routing_id, encode(message)]
        sent = self._sockets[peer.port].send_multipart(frames, flags=zmq.NOBLOCK)
        asyncio.ensure_future(sent).add_done_callback(_note)

    async def _tick(self) -> None:
        """Let nothing that is dead stay for long, a little at a time."""
        while True:
            self._registry.expire()
            self._operations.tick()
            busy = self._registry.index.sweep()
            await asyncio.sleep(_TURN_S if busy else _TICK_S)

    # Commands.

    async def _command(self, process: Process, name: str, timeout_s: float) -> Result:
        """Raises DeadlineExceeded without an answer in time."""
        peer = process.connection
        if not isinstance(peer, _Peer):
            raise NoWorker(f"instance {process.instance_id!r} has no connection")
        correlation = next(self._correlations)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = peer, future
        try:
            self._send(peer, Command(correlation, name, timeout_s))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._counts["commands_late_total"] += 1
            raise DeadlineExceeded(
                f"instance {process.instance_id!r} did not answer {name!r} within {timeout_s:g} s",
                hint="Its cache process is stopped, stuck or cut off",
            ) from None
        finally:
            self._waiting.pop(correlation, None)

    def _answered(self, peer: _Peer, result: Result) -> None:
        """Only the connection that was asked may answer."""
        asked, future = self._waiting.get(result.correlation, (None, None))
        if future is None or asked != peer or future.done():
            self._counts["results_unasked_total"] += 1
            return
        future.set_result(result)


def _workers(process: Process) -> list[WorkerInfo]:
    return [
        WorkerInfo(
            instance_id=process.instance_id,
            worker_id=worker.rank,
            ip=process.ip or process.said.host,
            port=worker.port,
            peer_init_url=process.said.peer_url,
            registration_time=process.registered_at,
            last_heartbeat_time=process.heard_at,
            alive=process.alive,
        )
        for worker in sorted(process.said.workers)
    ]


def _address(frame: zmq.Frame) -> str:
    """The peer's address as the socket knows it."""
    with suppress(zmq.ZMQError):
        address = frame.get("Peer-Address")
        if isinstance(address, str):
            return address
    return ""


def _note(sent: asyncio.Future[zmq.MessageTracker | None]) -> None:
    """Look at how a send went, so that asyncio does not complain that nobody did."""
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
