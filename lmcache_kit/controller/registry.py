"""The registry of cache processes: registration, liveness and fencing.

No sockets: a message and its connection go in, messages to send come out.

A cache process is unregistered, alive, silent (three heartbeats missed; lookups do not see it) or
dropped (silent for two minutes; it has to register again). Of two incarnations that claim one
instance the one that started later wins as long as it is alive. The other one is fenced, and may
take the instance over once the later one is silent. When the later one is heard again, it takes
the instance back.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from typing import TypeAlias

from lmcache_kit.controller.key_index import KeyIndex, Owner
from lmcache_kit.controller.metrics import CONTROLLER
from lmcache_kit.controller.replica import Replica
from lmcache_kit.errors import NoWorker, ProtocolError, UnknownName
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol.capability import CAPABILITY_KEY_BYTES
from lmcache_kit.protocol.control import (
    MAX_NAMESPACES,
    Batch,
    Confirm,
    Confirmed,
    Fenced,
    FromAgent,
    FromController,
    Goodbye,
    Heartbeat,
    NotRegistered,
    Refused,
    Register,
    Registered,
    Resync,
    SnapshotPart,
)

log = logging.getLogger(__name__)

Connection: TypeAlias = Hashable
"""Where a message came from. A registration speaks for its own connection, and no other."""

Outgoing: TypeAlias = list[tuple[Connection, FromController]]

MISSED_HEARTBEATS = 3
DROP_AFTER_S = 120.0
MAX_PROCESSES = 4096
MAX_LOCATIONS = 8
MAX_WORKERS = 1024
MAX_NAME = 256
_TOLD = 256
_SOON = "One that runs registers within seconds"
HEARTBEAT_RANGE_S = (0.05, 60.0)


class Process:
    """One incarnation of a cache process, as the controller knows it.

    ``heard`` is on the registry's clock; ``heard_at`` and ``registered_at`` are seconds since the
    epoch. ``alive`` means that a message came within three heartbeats.
    """

    def __init__(self, registration: Register, connection: Connection, ip: str) -> None:
        self.registration = registration
        self.connection = connection
        self.ip = ip
        self.alive = False
        self.heard = self.heard_at = self.registered_at = 0.0
        self.replicas: dict[str, Replica] = {}

    def __str__(self) -> str:
        """Name the instance and the host, for the log."""
        return f"instance {self.instance_id!r} at {_from(self.registration, self.ip)}"

    @property
    def instance_id(self) -> str:
        return self.registration.instance_id

    @property
    def heartbeat_s(self) -> float:
        low, high = HEARTBEAT_RANGE_S
        return min(max(self.registration.heartbeat_s, low), high)

    @property
    def silent_after(self) -> float:
        """When the process stops being alive unless heard, on the registry's clock."""
        return self.heard + MISSED_HEARTBEATS * self.heartbeat_s


class Registry:
    """All cache processes and the index of their chunks. Belongs to the controller's event loop.

    ``clock`` is monotonic; ``wall`` is in seconds since the epoch.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        drop_after_s: float = DROP_AFTER_S,
        max_processes: int = MAX_PROCESSES,
    ) -> None:
        self.index = KeyIndex()
        self.counts = CONTROLLER.counters()
        self._clock = clock
        self._wall = wall
        self._drop_after_s = drop_after_s
        self._max_processes = max_processes
        self._instances: dict[str, Process] = {}
        self._connections: dict[Connection, Process] = {}
        self._namespaces: Counter[Namespace] = Counter()
        self._next_silence = math.inf
        self._told: deque[tuple[str, bytes, str]] = deque(maxlen=_TOLD)

    # Queries.

    def find(self, instance_id: str) -> Process:
        """Return the process of an instance. Raise UnknownName, which lists the known instances."""
        self.expire()
        process = self._instances.get(instance_id)
        if process is None:
            raise UnknownName("instance", instance_id, sorted(self._instances), _SOON)
        return process

    def processes(self) -> list[Process]:
        """List all that are not dropped, alive or not, by instance id."""
        self.expire()
        return [self._instances[name] for name in sorted(self._instances)]

    def on(self, connection: Connection) -> Process | None:
        """Return the process that registered on a connection."""
        return self._connections.get(connection)

    def knows(self, process: Process) -> bool:
        """Whether this incarnation has neither ended, nor been dropped or replaced."""
        return self._instances.get(process.instance_id) is process

    def reachable(self, instance_id: str) -> Process:
        """Return the process of an instance that is alive. Raise UnknownName or NoWorker."""
        process = self.find(instance_id)
        if process.alive:
            return process
        raise NoWorker(
            f"instance {process.instance_id!r} has not been heard of for "
            f"{self._clock() - process.heard:.0f} s",
            hint="Its cache process has ended or cannot reach this controller",
        )

    def namespaces(self) -> Iterable[Namespace]:
        """Return the distinct base namespaces of the processes that are alive."""
        self.expire()
        return self._namespaces.keys()

    def check_model(self, model: str, process: Process | None = None) -> None:
        """Raise UnknownName, which lists the known models, unless a process registered this one.

        ``process``: the only one that counts. Silent ones count too: whoever names their model
        makes no mistake.
        """
        self.expire()
        known = {
            namespace.model
            for each in ([process] if process else self._instances.values())
            for namespace in each.registration.namespaces
        }
        if model not in known:
            raise UnknownName("model", model, sorted(known), _SOON)

    # Messages.

    def handle(self, connection: Connection, message: FromAgent, ip: str = "") -> Outgoing:
        """Handle a message and return the answers. Raise ProtocolError for an impossible one."""
        if isinstance(message, Register):
            return self._register(connection, message, ip)
        process = self.hear(connection)
        if process is None:
            self.counts["messages_unregistered_total"] += 1
            return [] if isinstance(message, Goodbye) else [(connection, NotRegistered())]
        now = self._clock()
        answers: list[Resync | Confirmed | None] = []
        match message:
            case Batch():
                answers.append(self._replica(process, message.location).batch(message, now))
            case SnapshotPart():
                answers.append(self._replica(process, message.location).snapshot(message, now))
            case Heartbeat():
                for position in message.positions:
                    replica = self._replica(process, position.location)
                    answers.append(replica.check(position, now))
            case Confirm(location, seq):
                answers.append(self._replica(process, location).confirm(seq, now))
            case Goodbye():
                self.counts["goodbyes_total"] += 1
                log.info("%s has ended and says goodbye", process)
                self._drop(process)
            case _:
                pass
        return [(connection, answer) for answer in answers if answer]

    def hear(self, connection: Connection) -> Process | None:
        """Mark the process of a connection as alive. Return None when none has registered on it."""
        process = self._connections.get(connection)
        if process is not None:
            process.heard, process.heard_at = self._clock(), self._wall()
            if not process.alive:
                log.info("%s is heard of again", process)
                self._set_alive(process, True)
        return process

    def expire(self) -> None:
        """Hide processes that missed three heartbeats, and drop those silent for long.

        Costs nothing until the next one can be late.
        """
        now = self._clock()
        if now < self._next_silence:
            return
        self._next_silence = math.inf
        for process in list(self._instances.values()):
            if process.alive and now >= process.silent_after:
                self.counts["processes_lost_total"] += 1
                log.info(
                    "%s is lost: not heard of for %.1f s; lookups do not see it",
                    process,
                    now - process.heard,
                )
                self._set_alive(process, False)
            due = process.silent_after
            if not process.alive:
                due = process.heard + max(self._drop_after_s, due - process.heard)
                if now >= due:
                    self.counts["processes_dropped_total"] += 1
                    log.info("%s is dropped: not heard of for %.0f s", process, now - process.heard)
                    self._drop(process)
                    continue
            self._next_silence = min(self._next_silence, due)

    # Registration.

    def _register(self, connection: Connection, registration: Register, ip: str) -> Outgoing:
        reason = _reason_to_refuse(registration)
        if reason:
            return self._refuse(connection, registration, ip, reason)
        self.expire()
        out: Outgoing = []
        current = self._instances.get(registration.instance_id)
        if current and current.registration.incarnation != registration.incarnation:
            if current.alive and _age(current.registration) > _age(registration):
                self.counts["fenced_total"] += 1
                self._tell(registration, "fenced", ip, f"{current} started later and has its id")
                return [(connection, Fenced(current.ip or current.registration.host))]
            if current.alive:
                self.counts["fenced_total"] += 1
                later = f"a process at {_from(registration, ip)} started later and takes its id"
                self._tell(current.registration, "fenced", current.ip, later)
                out.append((current.connection, Fenced(ip or registration.host)))
            self._drop(current)
            current = None
        before = self._connections.get(connection)
        if before and before is not current:
            log.info("%s is dropped: its connection registers another instance", before)
            self._drop(before)
        if current is None and not self._evict_silent():
            reason = f"{self._max_processes} cache processes are known"
            return self._refuse(connection, registration, ip, reason)
        process = current or self._admit(registration, connection, ip)
        if process.connection != connection:
            self._move(process, connection)
        self._update(process, registration, ip)
        resume = tuple((name, each.seq) for name, each in process.replicas.items())
        return [*out, (connection, Registered(resume))]

    def _refuse(
        self, connection: Connection, registration: Register, ip: str, reason: str
    ) -> Outgoing:
        self.counts["registrations_refused_total"] += 1
        self._tell(registration, "refused", ip, reason)
        return [(connection, Refused(reason))]

    def _tell(self, registration: Register, what: str, ip: str, why: str) -> None:
        """Log why a process is turned away, once: it asks again and again."""
        once = (registration.instance_id[:MAX_NAME], registration.incarnation[:16], what)
        if once not in self._told:
            self._told.append(once)
            who = f"instance {registration.instance_id!r:.300} at {_from(registration, ip)}"
            log.info("%s is %s: %s", who, what, why)

    def _admit(self, registration: Register, connection: Connection, ip: str) -> Process:
        self._told = deque(
            (each for each in self._told if each[1] != registration.incarnation), maxlen=_TOLD
        )
        process = Process(registration, connection, ip)
        process.registered_at = self._wall()
        self._instances[registration.instance_id] = process
        self._connections[connection] = process
        self.counts["registrations_total"] += 1
        log.info("%s is registered, with %s", process, ", ".join(map(repr, registration.locations)))
        return process

    def _move(self, process: Process, connection: Connection) -> None:
        """Take over the connection on which an incarnation that was cut off has come back."""
        self._connections.pop(process.connection, None)
        self._connections[connection] = process
        process.connection = connection
        self.counts["reconnections_total"] += 1
        log.info("%s is registered again, on a new connection", process)
        for replica in process.replicas.values():
            replica.restart()

    def _update(self, process: Process, registration: Register, ip: str) -> None:
        self._set_alive(process, False)
        process.registration, process.ip = registration, ip
        for name in process.replicas.keys() - set(registration.locations):
            process.replicas.pop(name).close()
        for name in registration.locations:
            if name not in process.replicas:
                owner = Owner(registration.instance_id, name)
                retry_s = max(1.0, 2 * process.heartbeat_s)
                process.replicas[name] = Replica(self.index, owner, retry_s, self.counts)
        process.heard, process.heard_at = self._clock(), self._wall()
        self._set_alive(process, True)

    def _evict_silent(self) -> bool:
        """Drop the process that was silent longest if there are too many. False: none is."""
        if len(self._instances) < self._max_processes:
            return True
        silent = [process for process in self._instances.values() if not process.alive]
        if not silent:
            return False
        longest = min(silent, key=lambda process: process.heard)
        log.info("%s is dropped for another: too many are known", longest)
        self._drop(longest)
        return True

    def _drop(self, process: Process) -> None:
        self._set_alive(process, False)
        del self._instances[process.instance_id]
        self._connections.pop(process.connection, None)
        for replica in process.replicas.values():
            replica.close()

    def _set_alive(self, process: Process, alive: bool) -> None:
        if process.alive == alive:
            return
        process.alive = alive
        for replica in process.replicas.values():
            (self.index.show if alive else self.index.hide)(replica.holder)
        for namespace in process.registration.namespaces:
            self._namespaces[namespace] += 1 if alive else -1
            if not self._namespaces[namespace]:
                del self._namespaces[namespace]
        if alive:
            self._next_silence = min(self._next_silence, process.silent_after)

    @staticmethod
    def _replica(process: Process, location: str) -> Replica:
        try:
            return process.replicas[location]
        except KeyError:
            raise ProtocolError(f"location {location!r:.100} is not registered") from None


def _from(registration: Register, ip: str) -> str:
    """Return the host and the address that a registration came from."""
    host = registration.host[:MAX_NAME]
    if host and ip and host != ip:
        return f"{host!r} ({ip})"
    return repr(host) if host else ip or "an unknown address"


def _age(registration: Register) -> tuple[float, bytes]:
    """Order incarnations by start; the name of the incarnation breaks a tie."""
    return registration.started, registration.incarnation


def _reason_to_refuse(registration: Register) -> str:
    """Return why a registration cannot be used; empty when it can."""
    names = [registration.instance_id, *registration.locations]
    ranks = {worker.rank for worker in registration.workers}
    checks = (
        (all(0 < len(name) <= MAX_NAME for name in names), "a name is empty or too long"),
        (len(registration.host) <= MAX_NAME, "the host is too long"),
        (len(registration.peer_url or "") <= 4 * MAX_NAME, "the peer url is too long"),
        (
            len(registration.peer_key) == (CAPABILITY_KEY_BYTES if registration.peer_url else 0),
            "the peer key does not fit",
        ),
        (len(registration.incarnation) == 16, "the incarnation is not 16 bytes"),
        (math.isfinite(registration.started), "the start time is not a time"),
        (
            math.isfinite(registration.heartbeat_s) and registration.heartbeat_s > 0,
            "the heartbeat is not a time",
        ),
        (0 < len(registration.locations) <= MAX_LOCATIONS, f"not 1 to {MAX_LOCATIONS} locations"),
        (
            len(set(registration.locations)) == len(registration.locations),
            "a location stands twice",
        ),
        (len(registration.workers) <= MAX_WORKERS, f"more than {MAX_WORKERS} workers"),
        (len(ranks) == len(registration.workers), "a rank stands twice"),
        (len(registration.namespaces) <= MAX_NAMESPACES, f"more than {MAX_NAMESPACES} namespaces"),
        (all(map(_usable, registration.namespaces)), "a namespace cannot be used"),
    )
    return next((reason for good, reason in checks if not good), "")


def _usable(namespace: Namespace) -> bool:
    """Whether keys can be made in a namespace, and the namespace is small."""
    texts = (
        namespace.model,
        namespace.weights,
        namespace.config,
        namespace.generation,
        namespace.layout.dtype,
        namespace.lora,
        namespace.cache_salt,
    )
    if max(map(len, texts)) > 4 * MAX_NAME or len(namespace.tags) > MAX_NAMESPACES:
        return False
    if any(len(text) > MAX_NAME for tag in namespace.tags for text in tag):
        return False
    if not 1 <= namespace.chunk_size <= 1 << 20:
        return False
    try:
        return bool(namespace.digest)
    except (struct.error, UnicodeEncodeError):
        return False
