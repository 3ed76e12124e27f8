"""The agent's end of the control plane: registration, changes, heartbeats and answers.

No sockets and no threads: :class:`~lmcache_kit.agent.agent.Agent` calls
:meth:`ControllerClient.turn` with a function that sends, and :meth:`ControllerClient.handle` with
each message of the controller. The other end is
:class:`~lmcache_kit.controller.registry.Registry`.

Only a registered client sends changes and heartbeats. A client that is unregistered registers every
heartbeat; one that was rejected (fenced or refused) asks again every ten, in case the later
incarnation has died. Every new connection begins unregistered, and so does a client that the
controller does not know (``NotRegistered``).

A client that is neither registered nor rejected, or whose messages are not taken, is out of touch.
After ``WARN_S`` seconds of that it warns once; the next registration, or the next message that is
taken, ends it and is told at INFO.
"""

from __future__ import annotations

import enum
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.metrics import AGENT
from lmcache_kit.agent.operations import OperationRunner
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol.control import (
    MAX_NAMESPACES,
    CancelOperation,
    Command,
    Confirm,
    Confirmed,
    Fenced,
    FromAgent,
    FromController,
    Heartbeat,
    NotRegistered,
    OperationAcknowledged,
    Refused,
    Register,
    Registered,
    Result,
    Resync,
    StartOperation,
    WorkerPort,
)

log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[FromAgent], bool]
"""Return False when the connection takes nothing now."""

FLUSH_S = 0.02
SLOW_HEARTBEATS = 10
WARN_S = 15.0
_HASTE_S = 0.5
_MAX_RESULTS = 256
_MAX_MESSAGES_A_TURN = 64


class _State(enum.Enum):
    UNREGISTERED = "unregistered"
    REGISTERED = "registered"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a cache process.

    ``incarnation`` has 16 bytes. ``started`` is in seconds since the epoch; of two incarnations
    that claim an instance the later one keeps it. ``worker_ports[rank]`` is the port shown for a
    rank. Peers fetch KV at ``peer_url``, with capabilities signed by ``peer_key`` of 32 bytes;
    None and empty for a process that takes no part in moves.
    """

    instance_id: str
    incarnation: bytes
    host: str = ""
    heartbeat_s: float = 1.0
    worker_ports: Sequence[int] = ()
    peer_url: str | None = None
    peer_key: bytes = field(default=b"", repr=False)
    started: float = field(default_factory=time.time)


class ControllerClient:
    """One cache process's conversation with the controller at ``url``.

    :meth:`register_worker` and :meth:`register_namespace` may be called from any thread; all else
    belongs to one thread.
    """

    def __init__(
        self,
        feeds: Sequence[LocationFeed],
        identity: Identity,
        *,
        url: str = "controller_url",
        runner: OperationRunner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocked = False
        self._url = url
        self.counts = AGENT.counters()
        self.feeds = {feed.location: feed for feed in feeds}
        self._identity = identity
        self._runner = runner or OperationRunner(None, clock=clock)
        self._heartbeat_s = identity.heartbeat_s
        self._clock = clock
        self._lock = threading.Lock()
        self._ranks: set[int] = set()
        self._namespaces: dict[Namespace, None] = {}
        self._changed = False
        self._state = _State.UNREGISTERED
        self._results: deque[Result] = deque(maxlen=_MAX_RESULTS)
        self._next_register = self._next_heartbeat = self._next_flush = 0.0
        self._warned: deque[str] = deque(maxlen=8)
        self._out_of_touch_since: float | None = None
        self._out_of_touch_told = False
        self._malformed_before = 0
        self._registration_taken = False

    @property
    def registered(self) -> bool:
        """Whether the controller has accepted the registration, as far as is known."""
        return self._state is _State.REGISTERED

    @property
    def rejected(self) -> bool:
        """Whether the controller prefers a later incarnation, or refuses the registration."""
        return self._state is _State.REJECTED

    def register_worker(self, rank: int) -> None:
        """Register a rank that stores here."""
        with self._lock:
            self._changed |= rank not in self._ranks
            self._ranks.add(rank)

    def register_namespace(
        self, namespace: Namespace, replaced: Collection[Namespace] = ()
    ) -> None:
        """Register a base namespace of stored chunks, in place of others that no engine uses.

        Only the latest few are kept: lookups find a cache that outlives many models by the last
        ones.
        """
        with self._lock:
            self._changed |= namespace not in self._namespaces
            self._namespaces.pop(namespace, None)
            self._namespaces[namespace] = None
            for each in replaced:
                self._namespaces.pop(each, None)
            if len(self._namespaces) > MAX_NAMESPACES:
                del self._namespaces[next(iter(self._namespaces))]

    def restart(self) -> None:
        """Begin on a new connection, unregistered."""
        self._state = _State.UNREGISTERED
        self._next_register = self._next_heartbeat = self._next_flush = 0.0
        self._runner.restart()
        for feed in self.feeds.values():
            feed.sync.restart()
        self.blocked = False

    def reject(self, reason: str) -> None:
        """Wait before the next registration, and log each new reason once."""
        self.counts["rejected_total"] += 1
        self._state = _State.REJECTED
        self._next_register = self._clock() + self._slow_s()
        if reason not in self._warned:
            self._warned.append(reason)
            log.warning(
                "lookups at the controller at %s do not find the cache of instance %r: %s",
                self._url,
                self._identity.instance_id,
                reason,
            )

    def gathering(self) -> bool:
        """Whether pending changes wait for more, so that another one need not wake the thread."""
        return self._has_pending() and self._clock() < self._next_flush

    def wait_s(self) -> float:
        """Return the time until something is due."""
        now = self._clock()
        if self.blocked:
            due = now + self._heartbeat_s
        elif self._state is not _State.REGISTERED:
            due = self._next_register
        elif any(feed.log.position() is None for feed in self.feeds.values()):
            due = now
        else:
            soon = self._runner.wait_s()
            due = self._next_heartbeat if soon is None else min(now + soon, self._next_heartbeat)
            for feed in self.feeds.values():
                if feed.sync.wanted_seq is not None:
                    due = min(due, feed.sync.due)
        if self._has_pending():
            due = min(due, self._next_flush)
        return max(0.0, min(due, self._warning_due()) - now)

    def turn(self, send: Send) -> None:
        """Send what is due; :attr:`blocked` tells whether ``send`` refused some of it."""
        self.blocked = False
        now = self._clock()
        self._number(now)
        self._send_due(send, now)
        self._watch(now)

    def _send_due(self, send: Send, now: float) -> None:
        if self._state is not _State.REGISTERED:
            if now >= self._next_register and self._register(send):
                slow = self._state is _State.REJECTED
                self._next_register = now + (self._slow_s() if slow else self._quick_s())
            return
        if self._changed and not self._register(send):
            return
        while self._results and self._try(send, self._results[0]):
            self._results.popleft()
        if not self.blocked:
            self._runner.turn(lambda report: self._try(send, report))
        if now >= self._next_heartbeat:
            positions = [feed.log.position() for feed in self.feeds.values()]
            if self._try(send, Heartbeat(tuple([each for each in positions if each]))):
                self._next_heartbeat = now + self._heartbeat_s
        for feed in self.feeds.values():
            if not self.blocked:
                self._send_changes(feed, send)
            if not self.blocked:
                self._confirm(feed, send, now)

    def _watch(self, now: float) -> None:
        """Notice that the controller is out of touch, or that it no longer is."""
        if self._state is _State.REJECTED:
            return
        if self._state is _State.REGISTERED and not self.blocked:
            if self._out_of_touch_told:
                log.info("the controller at %s is found again", self._url)
            self._in_touch()
        elif self._out_of_touch_since is None:
            self._out_of_touch_since = now
            self._malformed_before = self.counts["messages_malformed_total"]
        elif now >= self._warning_due():
            self._out_of_touch_told = True
            log.warning(
                "lookups do not find the cache of instance %r: no controller answers at %s for "
                "%.0f s: %s. Is controller_url right, and does the controller run? Serving goes "
                "on without it, and it is asked again and again",
                self._identity.instance_id,
                self._url,
                now - self._out_of_touch_since,
                self._what_is_there(),
            )

    def _warning_due(self) -> float:
        """Return when to warn that the controller is out of touch; once, and not after a refusal
        that was told."""
        if self._out_of_touch_since is None or self._out_of_touch_told or self._warned:
            return math.inf
        return self._out_of_touch_since + WARN_S

    def _what_is_there(self) -> str:
        if self.counts["messages_malformed_total"] > self._malformed_before:
            return "what answers there is no controller of this version"
        if self._registration_taken:
            return "what listens there says nothing"
        return "nothing there takes messages for a controller"

    def _in_touch(self) -> None:
        self._out_of_touch_since, self._out_of_touch_told = None, False

    def _has_pending(self) -> bool:
        return any(feed.log.has_pending for feed in self.feeds.values())

    def _number(self, now: float) -> None:
        """Number pending changes, unless more may come and no barrier waits."""
        due = now >= self._next_flush
        for feed in self.feeds.values():
            barriers = feed.sync.pending()
            if barriers or (due and feed.log.has_pending):
                feed.log.flush()
                self._next_flush = now + FLUSH_S
            feed.sync.assign(barriers, feed.log.last_seq)

    def _confirm(self, feed: LocationFeed, send: Send, now: float) -> None:
        """Ask about the changes that a barrier waits for, once they are sent."""
        seq = feed.sync.wanted_seq
        if seq is None or now < feed.sync.due or not feed.log.has_sent(seq):
            return
        if self._try(send, Confirm(feed.location, seq)):
            feed.sync.mark_asked(now)

    def _send_changes(self, feed: LocationFeed, send: Send) -> None:
        """Send batches or a snapshot, as many messages as go into one turn."""
        for _ in range(_MAX_MESSAGES_A_TURN):
            if feed.log.snapshot_needed:
                feed.take_snapshot()
                self.counts["snapshots_total"] += 1
            message = feed.log.next_message()
            if message is None and feed.log.snapshot_needed:
                continue
            if message is None or not self._try(send, message):
                return
            feed.log.mark_sent()

    def _register(self, send: Send) -> bool:
        with self._lock:
            self._changed = False
            ranks, namespaces = sorted(self._ranks), tuple(self._namespaces)
        identity = self._identity
        ports = dict(enumerate(identity.worker_ports))
        registration = Register(
            instance_id=identity.instance_id,
            incarnation=identity.incarnation,
            started=identity.started,
            host=identity.host,
            heartbeat_s=identity.heartbeat_s,
            locations=tuple(self.feeds),
            workers=tuple(WorkerPort(rank, ports.get(rank, 0)) for rank in ranks),
            namespaces=namespaces,
            peer_url=identity.peer_url,
            peer_key=identity.peer_key,
        )
        self._registration_taken = sent = self._try(send, registration)
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
        """Take in a message of the controller."""
        match message:
            case Registered():
                self._registered(message)
            case NotRegistered():
                if self._state is _State.REGISTERED:
                    self._state = _State.UNREGISTERED
                    self._next_register = 0.0
            case Resync():
                self._resync(message)
            case Confirmed():
                if feed := self.feeds.get(message.location):
                    feed.sync.complete(message.seq)
            case Fenced():
                self.reject(
                    f"a cache process at {message.by_host or 'another host'} that started later "
                    f"has this instance id; give each server its own lmcache_instance_id"
                )
            case Refused():
                self.reject(f"the controller refuses: {message.reason:.500}")
            case Command():
                error = "" if message.name == "ping" else f"unknown command {message.name!r:.100}"
                self._results.append(Result(message.correlation, error))
            case StartOperation() | CancelOperation() | OperationAcknowledged():
                self._runner.handle(message)

    def _registered(self, message: Registered) -> None:
        if self._state is _State.REGISTERED:
            # Workers or namespaces had changed; the changes go on where they were.
            return
        self._state = _State.REGISTERED
        self._warned.clear()
        self._next_heartbeat = 0.0
        self.counts["registrations_total"] += 1
        log.info(
            "instance %r is registered with the controller at %s%s",
            self._identity.instance_id,
            self._url,
            ", which is found again" if self._out_of_touch_told else "",
        )
        self._in_touch()
        for location, after_seq in message.resume:
            if feed := self.feeds.get(location):
                feed.log.replay(after_seq)

    def _resync(self, message: Resync) -> None:
        feed = self.feeds.get(message.location)
        if self._state is not _State.REGISTERED or feed is None:
            return
        self.counts["resyncs_total"] += 1
        if message.snapshot:
            feed.log.request_snapshot()
        elif not feed.log.sending_snapshot:
            feed.log.replay(message.after_seq)
