"""The agent: the thread of a cache process that reports to the controller."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence

import zmq

from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.event_log import MAX_PENDING, EventLog
from lmcache_kit.agent.location_feed import ChunkSource, LocationFeed
from lmcache_kit.agent.operations import OperationRunner
from lmcache_kit.errors import ProtocolError
from lmcache_kit.interfaces.operations import OperationExecutor
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol.address import connect_url
from lmcache_kit.protocol.control import (
    MAX_FRAME_BYTES,
    FromAgent,
    Goodbye,
    decode_from_controller,
    encode,
)
from lmcache_kit.protocol.wakeup import WakeupFd
from lmcache_kit.protocol.zmq_auth import WorkerKeys, handshakes, refusal

log = logging.getLogger(__name__)

_STOP_S = 2.0
_MAX_MESSAGES_A_TURN = 64
_SEND_QUEUE = 256


class Agent:
    """Reports the chunks of ``tiers`` to the controller at ``url``, from a thread of its own.

    Nothing here waits for the controller: it may be absent, start later, restart or move; within
    seconds of its coming its index is right. ``incarnation`` has 16 bytes.
    ``worker_ports[rank]`` is the port shown for a rank. ``started`` (seconds since the epoch, now
    by default) decides which of two incarnations keeps an instance: the later one. The other one
    logs this once, and asks again every ten heartbeats, in case the later one has died.
    Peers fetch KV at ``peer_url``, with capabilities signed by the 32 bytes of ``peer_key``; both
    or neither. ``executor`` carries out operations; without one they are refused. ``keys`` encrypt
    the connection and authenticate both ends. ``max_pending`` bounds the changes of a location
    that wait to be sent; more become a snapshot.
    """

    def __init__(
        self,
        tiers: Sequence[ChunkSource],
        *,
        url: str,
        instance_id: str,
        incarnation: bytes,
        host: str = "",
        heartbeat_s: float = 1.0,
        worker_ports: Sequence[int] = (),
        peer_url: str | None = None,
        peer_key: bytes = b"",
        started: float | None = None,
        executor: OperationExecutor | None = None,
        keys: WorkerKeys | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._keys = keys
        self._url = connect_url(url)
        self._instance_id = instance_id
        self._heartbeat_s = heartbeat_s
        self._changes = WakeupFd()
        self._feeds = [
            LocationFeed(
                tier,
                EventLog(tier.location, max_pending=max_pending),
                wake=self._changes.wake,
            )
            for tier in tiers
        ]
        self._urgent = WakeupFd()
        identity = Identity(
            instance_id=instance_id,
            incarnation=incarnation,
            host=host,
            heartbeat_s=heartbeat_s,
            worker_ports=tuple(worker_ports),
            peer_url=peer_url,
            peer_key=peer_key,
            started=time.time() if started is None else started,
        )
        self._runner = OperationRunner(executor, wake=self._urgent.wake)
        self._client = ControllerClient(
            self._feeds, identity, url=self._url.removeprefix("tcp://"), runner=self._runner
        )
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # Any thread.

    def start(self) -> None:
        """Listen to the tiers, and start the thread."""
        for feed in self._feeds:
            feed.start()
        self._thread = threading.Thread(target=self._run, name="lmcache-kit-agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end, within two seconds. Safe to call twice."""
        for feed in self._feeds:
            feed.sync.close()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for feed in self._feeds:
            feed.stop()
        self._stopping.set()
        self._urgent.wake()
        thread.join(_STOP_S)
        if thread.is_alive():
            log.warning("the agent of instance %r did not end in time", self._instance_id)
            return
        self._changes.close()
        self._urgent.close()

    def register_worker(self, rank: int) -> None:
        """Register a rank that stores here."""
        self._client.register_worker(rank)
        self._changes.wake()

    def register_namespace(
        self, namespace: Namespace, replaced: Collection[Namespace] = ()
    ) -> None:
        """Register a base namespace of stored chunks, in place of others that no engine uses."""
        self._client.register_namespace(namespace, replaced)
        self._changes.wake()

    def confirm(self, location: str, timeout_s: float) -> bool:
        """Wait until the controller's index holds everything that was at a location before.

        Return False if it does not within ``timeout_s`` seconds, or if the agent stops.
        """
        barrier = self._client.feeds[location].sync.open()
        self._urgent.wake()
        return barrier.wait(timeout_s)

    def stats(self) -> dict[str, float]:
        """Return counters ending in ``_total``, and gauges."""
        return {
            **self._client.counts,
            **self._runner.stats(),
            "registered": float(self._client.registered),
            "rejected": float(self._client.rejected),
            "seq": float(sum(feed.log.seq for feed in self._feeds)),
            "dropped_changes_total": float(sum(feed.log.dropped for feed in self._feeds)),
        }

    # The agent's thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with (
                    zmq.Context() as context,
                    context.socket(zmq.DEALER) as socket,
                    handshakes(socket, self._keys) as failed,
                ):
                    self._connect(socket)
                    refused = self._serve(socket, failed)
                if refused:
                    # ZMQ gives such an address up; the keys of one end may be put right.
                    self._client.reject(refused)
                    self._pause()
            except Exception:
                # Without this thread the index would forget this cache for good. Whatever went
                # wrong, a new connection and a snapshot start clean.
                self._client.counts["failures_total"] += 1
                log.exception("the agent of instance %r starts over", self._instance_id)
                for feed in self._feeds:
                    feed.log.request_snapshot()
                self._pause()
        self._runner.stop()  # if it ends between two connections

    def _pause(self) -> None:
        self._stopping.wait(min(1.0, self._heartbeat_s))

    def _connect(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.LINGER, 200)
        # Queue only for a connection that is there: messages that wait for one go out of date.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.IPV6, int("[" in self._url))
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, 3000)
        # Notice a host that is gone without a word, and resolve its name again.
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        if self._keys:
            self._keys.protect(socket)
        socket.connect(self._url)
        self._client.restart()

    def _serve(self, socket: zmq.Socket[bytes], failed: zmq.Socket[bytes]) -> str:
        """Serve a connection until the agent stops, or the controller refuses the connection.

        Return the reason of a refusal, else an empty string.
        """

        def send(message: FromAgent) -> bool:
            try:
                socket.send(encode(message), zmq.NOBLOCK)
            except zmq.Again:
                return False
            return True

        while not self._stopping.is_set():
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN | (zmq.POLLOUT if self._client.blocked else 0))
            poller.register(failed, zmq.POLLIN)
            poller.register(self._urgent.fileno(), zmq.POLLIN)
            if not self._client.gathering():
                poller.register(self._changes.fileno(), zmq.POLLIN)
            wait_s = self._client.wait_s()
            # Rounded up, so that nothing is polled for before it is due.
            poller.poll(int(wait_s * 1000) + 1 if wait_s else 0)
            if refused := refusal(failed, self._keys):
                return refused
            self._receive(socket)
            self._urgent.clear()
            if not self._client.gathering():
                self._changes.clear()
            self._client.turn(send)
        self._runner.stop()
        if self._client.registered:
            self._client.turn(send)
            send(Goodbye())
        return ""

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(_MAX_MESSAGES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._client.handle(decode_from_controller(b"".join(frames)))
            except ProtocolError as error:
                self._client.counts["messages_malformed_total"] += 1
                log.debug("dropped a message of the controller: %s", error)
