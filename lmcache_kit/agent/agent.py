"""The agent: a thread of the cache process that tells the controller what lies there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import zmq

from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.location_feed import Announced, LocationFeed
from lmcache_kit.agent.operations import Jobs
from lmcache_kit.errors import ProtocolError
from lmcache_kit.interfaces.operations import Operator
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
    """Announces what ``inventories`` hold to the controller at ``url``, from a thread of its own.

    Nothing here waits for the controller: it may be absent, start later, restart or move; within
    seconds of its coming its index is right. ``incarnation`` is 16 bytes that name this life.
    ``worker_ports[rank]`` is the port shown for a rank. ``started`` (seconds since the epoch, now
    by default) decides who keeps an instance id that two lives claim: the later one. The other
    one is told so, logs it once, and asks again every ten heartbeats, in case the later one has
    died. ``peer_url`` is where peers fetch KV, and ``peer_key`` the 32 secret bytes that their
    claims on it are sealed with; both or neither. ``operator`` carries out what the controller
    orders; without one orders are refused.
    ``keys`` encrypt the connection, and prove to each other who is there.
    """

    def __init__(
        self,
        inventories: Sequence[Announced],
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
        operator: Operator | None = None,
        keys: WorkerKeys | None = None,
    ) -> None:
        self._keys = keys
        self._url = connect_url(url)
        self._instance_id = instance_id
        self._heartbeat_s = heartbeat_s
        self._bell = WakeupFd()
        self._streams = [LocationFeed(each, ring=self._bell.ring) for each in inventories]
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
        self._jobs = Jobs(operator, wake=self._urgent.ring)
        self._session = ControllerClient(self._streams, identity, jobs=self._jobs)
        self._stopping = False
        self._thread: threading.Thread | None = None

    # Any thread.

    def start(self) -> None:
        """Begin. The inventories are listened to from here on."""
        self._bell.hang_up()
        self._urgent.hang_up()
        for stream in self._streams:
            stream.begin()
        self._thread = threading.Thread(target=self._run, name="lmcache-kit-agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end, within two seconds. Safe to call twice."""
        for stream in self._streams:
            stream.confirmations.close()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for stream in self._streams:
            stream.end()
        self._stopping = True
        self._urgent.ring()
        thread.join(_STOP_S)
        if thread.is_alive():
            log.warning("the agent of instance %r did not end in time", self._instance_id)
            return
        self._bell.take_down()
        self._urgent.take_down()

    def register_worker(self, rank: int) -> None:
        """This rank stores here."""
        self._session.register_worker(rank)
        self._bell.ring()

    def register_namespace(self, namespace: Namespace) -> None:
        """Chunks are stored under this base namespace."""
        self._session.register_namespace(namespace)
        self._bell.ring()

    def confirm(self, location: str, timeout_s: float) -> bool:
        """Wait until the controller says that its index of one location holds everything that was
        there before this call. False if it does not within ``timeout_s`` seconds, or if we
        stop."""
        wait = self._session.streams[location].confirmations.ask()
        self._urgent.ring()
        return wait.until(timeout_s)

    def stats(self) -> dict[str, float]:
        """Counters ending in ``_total``, and gauges."""
        return {
            **self._session.counts,
            **self._jobs.stats(),
            "registered": float(self._session.registered),
            "turned_away": float(self._session.turned_away),
            "seq": float(sum(stream.announcer.seq for stream in self._streams)),
            "dropped_notes_total": float(
                sum(stream.announcer.dropped_notes for stream in self._streams)
            ),
        }

    # The agent's thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                with (
                    zmq.Context() as context,
                    context.socket(zmq.DEALER) as socket,
                    handshakes(socket, self._keys) as failed,
                ):
                    self._connect(socket)
                    refused = self._talk(socket, failed)
                if refused:
                    # ZMQ gives such an address up; one of the two ends may be put right.
                    self._session.shut_out(refused)
                    self._pause()
            except Exception:
                # This thread must not die: without it the index would forget this cache for
                # good. Whatever went wrong, a new connection and a snapshot start clean.
                self._session.counts["failures_total"] += 1
                log.exception("the agent of instance %r starts over", self._instance_id)
                for stream in self._streams:
                    stream.announcer.want_snapshot()
                self._pause()
        self._jobs.stop()  # if it ends between two connections

    def _pause(self) -> None:
        time.sleep(min(1.0, self._heartbeat_s))

    def _connect(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.LINGER, 200)
        # Queue only for a connection that is there: what waited for one would come out of date.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.IPV6, int("[" in self._url))
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, 3000)
        # A host that is gone without a word is noticed, and its name resolved again.
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        if self._keys:
            self._keys.protect(socket)
        socket.connect(self._url)
        self._session.restart()

    def _talk(self, socket: zmq.Socket[bytes], failed: zmq.Socket[bytes]) -> str:
        """Until we stop, or the controller refuses the connection: then why it may have."""

        def send(message: FromAgent) -> bool:
            try:
                socket.send(encode(message), zmq.NOBLOCK)
            except zmq.Again:
                return False
            return True

        while not self._stopping:
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN | (zmq.POLLOUT if self._session.blocked else 0))
            poller.register(failed, zmq.POLLIN)
            poller.register(self._urgent.fd, zmq.POLLIN)
            if not self._session.gathering():
                poller.register(self._bell.fd, zmq.POLLIN)
            wait_s = self._session.wait_s()
            # Rounded up, so that nothing is polled for before it is due.
            poller.poll(int(wait_s * 1000) + 1 if wait_s else 0)
            if refused := refusal(failed, self._keys):
                return refused
            self._hear(socket)
            self._urgent.rest()
            if not self._session.gathering():
                self._bell.rest()
            self._session.turn(send)
        self._jobs.stop()
        if self._session.registered:
            self._session.turn(send)
            send(Goodbye())
        return ""

    def _hear(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(_MAX_MESSAGES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._session.handle(decode_from_controller(b"".join(frames)))
            except ProtocolError as error:
                self._session.counts["messages_malformed_total"] += 1
                log.debug("dropped a message of the controller: %s", error)
