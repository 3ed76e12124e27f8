"""What the agent says and when: registration, changes, heartbeats, answers.

No sockets and no threads: :class:`~lmcache_kit.agent.agent.Agent` calls
:meth:`ControllerClient.turn` with a function that sends, and :meth:`ControllerClient.handle` with
what came. The other end is :class:`~lmcache_kit.controller.registry.Registry`.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.operations import Jobs
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol.control import (
    MAX_NAMESPACES,
    Begin,
    Cancel,
    Command,
    Confirm,
    Confirmed,
    Fenced,
    FromAgent,
    FromController,
    Heartbeat,
    NotRegistered,
    Refused,
    Register,
    Registered,
    Result,
    Resync,
    Settled,
    WorkerPort,
)

log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[FromAgent], bool]
"""False: the connection takes nothing now."""

FLUSH_S = 0.02
SLOW_HEARTBEATS = 10
_HASTE_S = 0.5
_MAX_RESULTS = 256
_MAX_MESSAGES_A_TURN = 64


class _State(enum.Enum):
    STRANGER = "stranger"
    REGISTERED = "registered"
    TURNED_AWAY = "turned away"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who announces. ``incarnation``: 16 bytes that name this life. ``started``: seconds since
    the epoch; of two lives that claim an instance id the later one keeps it.
    ``worker_ports[rank]`` is the port shown for a rank. ``peer_url`` and ``peer_key``: where peers
    fetch KV, and the 32 bytes that their claims on it are sealed with; None and empty: nowhere."""

    instance_id: str
    incarnation: bytes
    host: str = ""
    heartbeat_s: float = 1.0
    worker_ports: Sequence[int] = ()
    peer_url: str | None = None
    peer_key: bytes = field(default=b"", repr=False)
    started: float = field(default_factory=time.time)


class ControllerClient:
    """One cache process's talk with the controller. :meth:`register_worker` and
    :meth:`register_namespace` may be called from any thread, all else by one."""

    def __init__(
        self,
        streams: Sequence[LocationFeed],
        identity: Identity,
        *,
        jobs: Jobs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocked = False
        self.counts: Counter[str] = Counter()
        self.streams = {stream.location: stream for stream in streams}
        self._identity = identity
        self._jobs = jobs or Jobs(None, clock=clock)
        self._heartbeat_s = identity.heartbeat_s
        self._clock = clock
        self._lock = threading.Lock()
        self._ranks: set[int] = set()
        self._namespaces: dict[Namespace, None] = {}
        self._changed = False
        self._state = _State.STRANGER
        self._results: deque[Result] = deque(maxlen=_MAX_RESULTS)
        self._next_register = self._next_heartbeat = self._next_flush = 0.0
        self._told: deque[str] = deque(maxlen=8)

    @property
    def registered(self) -> bool:
        """Whether the controller has taken us in, as far as we know."""
        return self._state is _State.REGISTERED

    @property
    def turned_away(self) -> bool:
        """Whether the controller prefers a later life, or refuses us."""
        return self._state is _State.TURNED_AWAY

    def register_worker(self, rank: int) -> None:
        """This rank stores here."""
        with self._lock:
            self._changed |= rank not in self._ranks
            self._ranks.add(rank)

    def register_namespace(self, namespace: Namespace) -> None:
        """Chunks are stored under this base namespace. Only the latest few are kept: a cache
        that outlives many models goes on being found by the last ones."""
        with self._lock:
            self._changed |= namespace not in self._namespaces
            self._namespaces.pop(namespace, None)
            self._namespaces[namespace] = None
            if len(self._namespaces) > MAX_NAMESPACES:
                del self._namespaces[next(iter(self._namespaces))]

    def restart(self) -> None:
        """A connection that knows nothing of us begins."""
        self._state = _State.STRANGER
        self._next_register = self._next_heartbeat = self._next_flush = 0.0
        self._jobs.restart()
        for stream in self.streams.values():
            stream.confirmations.restart()
        self.blocked = False

    def shut_out(self, why: str) -> None:
        """The connection was refused before anything could be said."""
        self._turned_away(why)

    def gathering(self) -> bool:
        """Whether there are notes that wait for more to come, so that none need wake us."""
        return self._has_notes() and self._clock() < self._next_flush

    def wait_s(self) -> float:
        """How long until something is due."""
        now = self._clock()
        if self.blocked:
            due = now + self._heartbeat_s
        elif self._state is not _State.REGISTERED:
            due = self._next_register
        elif any(stream.announcer.position() is None for stream in self.streams.values()):
            due = now
        else:
            soon = self._jobs.wait_s()
            due = self._next_heartbeat if soon is None else min(now + soon, self._next_heartbeat)
            for stream in self.streams.values():
                if stream.confirmations.wanted is not None:
                    due = min(due, stream.confirmations.due())
        if self._has_notes():
            due = min(due, self._next_flush)
        return max(0.0, due - now)

    def turn(self, send: Send) -> None:
        """Say what is due; :attr:`blocked` tells whether ``send`` refused some of it."""
        self.blocked = False
        now = self._clock()
        self._number(now)
        if self._state is not _State.REGISTERED:
            if now >= self._next_register and self._register(send):
                slow = self._state is _State.TURNED_AWAY
                self._next_register = now + (self._slow_s() if slow else self._quick_s())
            return
        if self._changed and not self._register(send):
            return
        while self._results and self._try(send, self._results[0]):
            self._results.popleft()
        if not self.blocked:
            self._jobs.turn(lambda message: self._try(send, message))
        if now >= self._next_heartbeat:
            positions = [stream.announcer.position() for stream in self.streams.values()]
            if self._try(send, Heartbeat(tuple([each for each in positions if each]))):
                self._next_heartbeat = now + self._heartbeat_s
        for stream in self.streams.values():
            if not self.blocked:
                self._announce(stream, send)
            if not self.blocked:
                self._confirm(stream, send, now)

    def _has_notes(self) -> bool:
        return any(stream.announcer.has_notes() for stream in self.streams.values())

    def _number(self, now: float) -> None:
        """What was noted, unless more may come and nobody waits."""
        due = now >= self._next_flush
        for stream in self.streams.values():
            waits = stream.confirmations.fresh()
            if waits or (due and stream.announcer.has_notes()):
                stream.announcer.flush()
                self._next_flush = now + FLUSH_S
            stream.confirmations.number(waits, stream.announcer.last_seq)

    def _confirm(self, stream: LocationFeed, send: Send, now: float) -> None:
        """Ask whether the index holds what somebody waits for, once it is on its way."""
        seq = stream.confirmations.wanted
        if seq is None or now < stream.confirmations.due() or not stream.announcer.has_sent(seq):
            return
        if self._try(send, Confirm(stream.location, seq)):
            stream.confirmations.said(now)

    def _announce(self, stream: LocationFeed, send: Send) -> None:
        """Send changes or a snapshot, as much as goes in one turn."""
        announcer = stream.announcer
        for _ in range(_MAX_MESSAGES_A_TURN):
            if announcer.wants_snapshot:
                stream.take_snapshot()
                self.counts["snapshots_total"] += 1
            message = announcer.next_message()
            if message is None and announcer.wants_snapshot:
                continue
            if message is None or not self._try(send, message):
                return
            announcer.sent()

    def _register(self, send: Send) -> bool:
        with self._lock:
            self._changed = False
            ranks, namespaces = sorted(self._ranks), tuple(self._namespaces)
        who = self._identity
        ports = dict(enumerate(who.worker_ports))
        said = Register(
            instance_id=who.instance_id,
            incarnation=who.incarnation,
            started=who.started,
            host=who.host,
            heartbeat_s=who.heartbeat_s,
            locations=tuple(self.streams),
            workers=tuple(WorkerPort(rank, ports.get(rank, 0)) for rank in ranks),
            namespaces=namespaces,
            peer_url=who.peer_url,
            peer_key=who.peer_key,
        )
        sent = self._try(send, said)
        self._changed = self._changed or not sent
        return sent

    def _try(self, send: Send, message: FromAgent) -> bool:
        self.blocked = not send(message)
        self.counts["messages_sent_total"] += not self.blocked
        return not self.blocked

    def _quick_s(self) -> float:
        return max(self._heartbeat_s, _HASTE_S)

    def _slow_s(self) -> float:
        return max(SLOW_HEARTBEATS * self._heartbeat_s, _HASTE_S)

    def handle(self, message: FromController) -> None:
        """Take in what the controller says."""
        match message:
            case Registered():
                self._registered(message)
            case NotRegistered():
                if self._state is _State.REGISTERED:
                    self._state = _State.STRANGER
                    self._next_register = 0.0
            case Resync():
                self._resync(message)
            case Confirmed():
                if stream := self.streams.get(message.location):
                    stream.confirmations.answered(message.seq)
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
            case Begin():
                self._jobs.begin(message)
            case Cancel():
                self._jobs.cancel(message.event_id)
            case Settled():
                self._jobs.settled(message.event_id)

    def _registered(self, message: Registered) -> None:
        if self._state is _State.REGISTERED:
            # Only something about us had changed; the stream goes on.
            return
        self._state = _State.REGISTERED
        self._told.clear()
        self._next_heartbeat = 0.0
        self.counts["registrations_total"] += 1
        log.info("instance %r is registered", self._identity.instance_id)
        for location, after_seq in message.resume:
            if stream := self.streams.get(location):
                stream.announcer.resume(after_seq)

    def _resync(self, message: Resync) -> None:
        stream = self.streams.get(message.location)
        if self._state is not _State.REGISTERED or stream is None:
            return
        self.counts["resyncs_total"] += 1
        if message.snapshot:
            stream.announcer.want_snapshot()
        elif not stream.announcer.sending_snapshot:
            stream.announcer.resume(message.after_seq)

    def _turned_away(self, why: str) -> None:
        self.counts["turned_away_total"] += 1
        self._state = _State.TURNED_AWAY
        self._next_register = self._clock() + self._slow_s()
        if why not in self._told:
            self._told.append(why)
            log.warning(
                "lookups do not find the cache of instance %r: %s", self._identity.instance_id, why
            )
