"""The agent: a thread of the cache process that tells the controller what lies there."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

from lmcache_kit.cache.records import ChangeListener, StoredChunk
from lmcache_kit.control.address import connect_url
from lmcache_kit.control.announcer import Announcer
from lmcache_kit.control.wire import (
    MAX_FRAME_BYTES,
    Command,
    Fenced,
    FromAgent,
    FromController,
    Goodbye,
    Heartbeat,
    Refused,
    Register,
    Registered,
    Result,
    Resync,
    WhoAreYou,
    WorkerPort,
    decode_from_controller,
    encode,
)
from lmcache_kit.errors import ProtocolError
from lmcache_kit.keys import ChunkKey, Namespace

log = logging.getLogger(__name__)

FLUSH_S = 0.02
SLOW_HEARTBEATS = 10
_HASTE_S = 0.5
_STOP_S = 2.0
_MAX_RESULTS = 256
_MAX_MESSAGES_A_TURN = 64
_SEND_QUEUE = 256


class Engine(Protocol):
    """What the agent needs of a :class:`~lmcache_kit.cache.engine.CacheEngine`."""

    @property
    def location(self) -> str: ...

    def subscribe(self, listener: ChangeListener) -> list[StoredChunk]: ...

    def unsubscribe(self, listener: ChangeListener) -> None: ...

    def snapshot(self, receive: Callable[[list[StoredChunk]], None]) -> None: ...


class _State(enum.Enum):
    STRANGER = "stranger"
    REGISTERED = "registered"
    TURNED_AWAY = "turned away"


class Agent:
    """Announces what ``engine`` holds to the controller at ``url``, from a thread of its own.

    Nothing here waits for the controller: it may be absent, start later, restart or move; within
    seconds of its coming its index is right. ``incarnation`` is 16 bytes that name this life.
    ``worker_ports[rank]`` is the port shown for a rank. ``started`` (seconds since the epoch)
    decides who keeps an instance id that two lives claim: the later one. The other one is told
    so, logs it once, and asks again every ten heartbeats, in case the later one has died.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        url: str,
        instance_id: str,
        incarnation: bytes,
        host: str = "",
        heartbeat_s: float = 1.0,
        worker_ports: Sequence[int] = (),
        peer_url: str | None = None,
        started: float | None = None,
    ) -> None:
        self._engine = engine
        self._url = connect_url(url)
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._host = host
        self._heartbeat_s = heartbeat_s
        self._worker_ports = tuple(worker_ports)
        self._peer_url = peer_url
        self._started = time.time() if started is None else started
        self._announcer = Announcer(engine.location)
        self._lock = threading.Lock()
        self._ranks: set[int] = set()
        self._namespaces: dict[Namespace, None] = {}
        self._changed = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._wake_fd = -1
        self._woken = False
        self._counts: Counter[str] = Counter()
        self._state = _State.STRANGER
        self._results: deque[Result] = deque(maxlen=_MAX_RESULTS)
        self._next_register = self._next_heartbeat = self._next_flush = 0.0
        self._blocked = False
        self._told = ""

    # Any thread.

    def start(self) -> None:
        """Begin. The engine is listened to from here on."""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._announcer.begin_with(self._engine.subscribe(self))
        self._thread = threading.Thread(target=self._run, name="lmcache-kit-agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye and end, within two seconds. Safe to call twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._engine.unsubscribe(self)
        self._stopping = True
        self._wake()
        thread.join(_STOP_S)
        if thread.is_alive():
            log.warning("the agent of instance %r did not end in time", self._instance_id)
            return
        with self._lock:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def register_worker(self, rank: int) -> None:
        """This rank stores here."""
        with self._lock:
            self._changed |= rank not in self._ranks
            self._ranks.add(rank)
        self._wake()

    def register_namespace(self, namespace: Namespace) -> None:
        """Chunks are stored under this base namespace."""
        with self._lock:
            self._changed |= namespace not in self._namespaces
            self._namespaces[namespace] = None
        self._wake()

    def stats(self) -> dict[str, float]:
        """Counters ending in ``_total``, and gauges."""
        return {
            **self._counts,
            "registered": float(self._state is _State.REGISTERED),
            "fenced": float(self._state is _State.TURNED_AWAY),
            "seq": float(self._announcer.seq),
            "dropped_notes_total": float(self._announcer.dropped_notes),
        }

    # The engine's threads, under its lock.

    def added(self, chunk: StoredChunk) -> None:
        """Take a note."""
        self._announcer.added(chunk)
        self._wake()

    def removed(self, key: ChunkKey) -> None:
        """Take a note."""
        self._announcer.removed(key)
        self._wake()

    def _wake(self) -> None:
        """Only the first note after a turn costs a system call."""
        if not self._woken:
            self._woken = True
            with self._lock:
                if self._wake_fd >= 0:
                    os.eventfd_write(self._wake_fd, 1)

    # The agent's thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
                    self._connect(socket)
                    self._talk(socket)
            except Exception:
                # This thread must not die: without it the index would forget this cache for
                # good. Whatever went wrong, a new connection and a snapshot start clean.
                self._counts["failures_total"] += 1
                log.exception("the agent of instance %r starts over", self._instance_id)
                self._announcer.want_snapshot()
                time.sleep(min(1.0, self._heartbeat_s))

    def _connect(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.LINGER, 200)
        # Queue only for a connection that is there: what waited for one would come out of date.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, 3000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.connect(self._url)
        self._state = _State.STRANGER
        self._next_register = self._next_heartbeat = self._next_flush = 0.0
        self._blocked = False

    def _talk(self, socket: zmq.Socket[bytes]) -> None:
        while not self._stopping:
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN | (zmq.POLLOUT if self._blocked else 0))
            if not self._gathering():
                poller.register(self._wake_fd, zmq.POLLIN)
            poller.poll(self._wait_ms())
            self._blocked = False
            self._hear(socket)
            self._note_changes()
            self._say(socket)
        if self._state is _State.REGISTERED:
            self._send(socket, Goodbye())

    def _gathering(self) -> bool:
        """Whether there are notes that wait for more to come, so that none need wake us."""
        return self._announcer.has_notes() and time.monotonic() < self._next_flush

    def _wait_ms(self) -> int:
        """Until something is due."""
        now = time.monotonic()
        if self._blocked:
            due = now + self._heartbeat_s
        elif self._state is not _State.REGISTERED:
            due = self._next_register
        elif self._announcer.position() is None:
            due = now
        else:
            due = self._next_heartbeat
        if self._announcer.has_notes():
            due = min(due, self._next_flush)
        return max(0, int((due - now) * 1000) + 1) if due > now else 0

    def _note_changes(self) -> None:
        """Number what the engine did, but not so often that each chunk is a message."""
        if self._gathering():
            return
        # First of all: whatever comes after this wakes us again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._woken = False
        now = time.monotonic()
        if self._announcer.has_notes() and now >= self._next_flush:
            self._announcer.flush()
            self._next_flush = now + FLUSH_S

    def _say(self, socket: zmq.Socket[bytes]) -> None:
        now = time.monotonic()
        if self._state is not _State.REGISTERED:
            if now >= self._next_register and self._register(socket):
                slow = self._state is _State.TURNED_AWAY
                pause_s = SLOW_HEARTBEATS * self._heartbeat_s if slow else self._heartbeat_s
                self._next_register = now + max(pause_s, _HASTE_S)
            return
        if self._changed and not self._register(socket):
            return
        while self._results and self._send(socket, self._results[0]):
            self._results.popleft()
        if now >= self._next_heartbeat:
            position = self._announcer.position()
            if self._send(socket, Heartbeat((position,) if position else ())):
                self._next_heartbeat = now + self._heartbeat_s
        if not self._blocked:
            self._announce(socket)

    def _announce(self, socket: zmq.Socket[bytes]) -> None:
        """Send changes or a snapshot, as much as goes in one turn."""
        announcer = self._announcer
        for _ in range(_MAX_MESSAGES_A_TURN):
            if announcer.wants_snapshot:
                self._engine.snapshot(announcer.snapshot_is)
                announcer.start_snapshot()
                self._counts["snapshots_total"] += 1
            message = announcer.next_message()
            if message is None and announcer.wants_snapshot:
                continue
            if message is None or not self._send(socket, message):
                return
            announcer.sent()

    def _register(self, socket: zmq.Socket[bytes]) -> bool:
        with self._lock:
            self._changed = False
            ranks, namespaces = sorted(self._ranks), tuple(self._namespaces)
        ports = dict(enumerate(self._worker_ports))
        said = Register(
            instance_id=self._instance_id,
            incarnation=self._incarnation,
            started=self._started,
            host=self._host,
            heartbeat_s=self._heartbeat_s,
            locations=(self._announcer.location,),
            workers=tuple(WorkerPort(rank, ports.get(rank, 0)) for rank in ranks),
            namespaces=namespaces,
            peer_url=self._peer_url,
        )
        sent = self._send(socket, said)
        self._changed = self._changed or not sent
        return sent

    def _send(self, socket: zmq.Socket[bytes], message: FromAgent) -> bool:
        try:
            socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._blocked = True
            return False
        self._counts["messages_sent_total"] += 1
        return True

    def _hear(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(_MAX_MESSAGES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handle(decode_from_controller(b"".join(frames)))
            except ProtocolError as error:
                self._counts["messages_malformed_total"] += 1
                log.debug("dropped a message of the controller: %s", error)

    def _handle(self, message: FromController) -> None:
        match message:
            case Registered():
                self._registered(message)
            case WhoAreYou():
                if self._state is _State.REGISTERED:
                    self._state = _State.STRANGER
                    self._next_register = 0.0
            case Resync():
                self._resync(message)
            case Fenced():
                self._turned_away(
                    f"a cache process at {message.by_host or 'another host'} that started later "
                    f"has this instance id; give each server its own lmcache_instance_id"
                )
            case Refused():
                self._turned_away(f"the controller refuses: {message.reason:.500}")
            case Command():
                error = "" if message.name == "ping" else f"unknown command {message.name!r:.100}"
                self._results.append(Result(message.correlation, error))

    def _registered(self, message: Registered) -> None:
        if self._state is _State.REGISTERED:
            # Only something about us had changed; the stream goes on.
            return
        self._state = _State.REGISTERED
        self._told = ""
        self._next_heartbeat = 0.0
        self._counts["registrations_total"] += 1
        log.info("instance %r is registered at %s", self._instance_id, self._url)
        for location, after_seq in message.resume:
            if location == self._announcer.location:
                self._announcer.resume(after_seq)

    def _resync(self, message: Resync) -> None:
        if self._state is not _State.REGISTERED or message.location != self._announcer.location:
            return
        self._counts["resyncs_total"] += 1
        if message.snapshot:
            self._announcer.want_snapshot()
        elif not self._announcer.sending_snapshot:
            self._announcer.resume(message.after_seq)

    def _turned_away(self, why: str) -> None:
        self._counts["turned_away_total"] += 1
        self._state = _State.TURNED_AWAY
        self._next_register = time.monotonic() + max(SLOW_HEARTBEATS * self._heartbeat_s, _HASTE_S)
        if why != self._told:
            self._told = why
            log.warning("lookups do not find the cache of instance %r: %s", self._instance_id, why)
