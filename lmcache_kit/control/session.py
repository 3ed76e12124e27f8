"""What the agent says and when: registration, changes, heartbeats, answers.

No sockets and no threads: :class:`~lmcache_kit.control.agent.Agent` calls :meth:`Session.turn`
with a function that sends, and :meth:`Session.handle` with what came. The other end is
:class:`~lmcache_kit.control.registry.Registry`.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from lmcache_kit.cache.records import ChangeListener, StoredChunk
from lmcache_kit.control.announcer import Announcer
from lmcache_kit.control.jobs import Jobs
from lmcache_kit.control.wire import (
    MAX_NAMESPACES,
    Begin,
    Cancel,
    Command,
    Fenced,
    FromAgent,
    FromController,
    Heartbeat,
    Refused,
    Register,
    Registered,
    Result,
    Resync,
    Settled,
    WhoAreYou,
    WorkerPort,
)
from lmcache_kit.keys import Namespace

log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[FromAgent], bool]
"""False: the connection takes nothing now."""

FLUSH_S = 0.02
SLOW_HEARTBEATS = 10
_HASTE_S = 0.5
_MAX_RESULTS = 256
_MAX_MESSAGES_A_TURN = 64


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


@dataclass(frozen=True, slots=True)
class Identity:
    """Who announces. ``incarnation``: 16 bytes that name this life. ``started``: seconds since
    the epoch; of two lives that claim an instance id the later one keeps it.
    ``worker_ports[rank]`` is the port shown for a rank."""

    instance_id: str
    incarnation: bytes
    host: str = ""
    heartbeat_s: float = 1.0
    worker_ports: Sequence[int] = ()
    peer_url: str | None = None
    started: float = field(default_factory=time.time)


class Session:
    """One cache process's talk with the controller. :meth:`register_worker` and
    :meth:`register_namespace` may be called from any thread, all else by one."""

    def __init__(
        self,
        engine: Engine,
        announcer: Announcer,
        identity: Identity,
        *,
        jobs: Jobs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocked = False
        self.counts: Counter[str] = Counter()
        self._engine = engine
        self._announcer = announcer
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
        self.blocked = False

    def shut_out(self, why: str) -> None:
        """The connection was refused before anything could be said."""
        self._turned_away(why)

    def gathering(self) -> bool:
        """Whether there are notes that wait for more to come, so that none need wake us."""
        return self._announcer.has_notes() and self._clock() < self._next_flush

    def wait_s(self) -> float:
        """How long until something is due."""
        now = self._clock()
        if self.blocked:
            due = now + self._heartbeat_s
        elif self._state is not _State.REGISTERED:
            due = self._next_register
        elif self._announcer.position() is None:
            due = now
        else:
            soon = self._jobs.wait_s()
            due = self._next_heartbeat if soon is None else min(now + soon, self._next_heartbeat)
        if self._announcer.has_notes():
            due = min(due, self._next_flush)
        return max(0.0, due - now)

    def turn(self, send: Send) -> None:
        """Say what is due; :attr:`blocked` tells whether ``send`` refused some of it."""
        self.blocked = False
        now = self._clock()
        if self._announcer.has_notes() and now >= self._next_flush:
            self._announcer.flush()
            self._next_flush = now + FLUSH_S
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
            position = self._announcer.position()
            if self._try(send, Heartbeat((position,) if position else ())):
                self._next_heartbeat = now + self._heartbeat_s
        if not self.blocked:
            self._announce(send)

    def _announce(self, send: Send) -> None:
        """Send changes or a snapshot, as much as goes in one turn."""
        announcer = self._announcer
        for _ in range(_MAX_MESSAGES_A_TURN):
            if announcer.wants_snapshot:
                self._engine.snapshot(announcer.snapshot_is)
                announcer.start_snapshot()
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
            locations=(self._announcer.location,),
            workers=tuple(WorkerPort(rank, ports.get(rank, 0)) for rank in ranks),
            namespaces=namespaces,
            peer_url=who.peer_url,
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
            if location == self._announcer.location:
                self._announcer.resume(after_seq)

    def _resync(self, message: Resync) -> None:
        if self._state is not _State.REGISTERED or message.location != self._announcer.location:
            return
        self.counts["resyncs_total"] += 1
        if message.snapshot:
            self._announcer.want_snapshot()
        elif not self._announcer.sending_snapshot:
            self._announcer.resume(message.after_seq)

    def _turned_away(self, why: str) -> None:
        self.counts["turned_away_total"] += 1
        self._state = _State.TURNED_AWAY
        self._next_register = self._clock() + self._slow_s()
        if why not in self._told:
            self._told.append(why)
            log.warning(
                "lookups do not find the cache of instance %r: %s", self._identity.instance_id, why
            )
