"""Frontends, and what the controller offers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from lmcache_kit.interfaces.operations import Order, PinInfo, Progress


class LookupQuery(msgspec.Struct, frozen=True):
    """Who holds the KV of these tokens? ``None`` means any; ``cache_salt`` is exact. Tokens in an
    ``array("I")`` are looked up fastest."""

    tokens: Sequence[int]
    model: str | None = None
    cache_salt: str = ""
    instance_id: str | None = None


class LocationMatch(msgspec.Struct, frozen=True):
    """How many tokens, counted from the first one without a gap, lie at one location.

    ``stopped``: why the match ended there: ``"end"`` (all tokens matched), ``"missing"`` (nobody
    holds the next chunk) or ``"elsewhere"`` (another holder does).
    """

    location: str
    tokens: int
    stopped: str


class InstanceMatch(msgspec.Struct, frozen=True):
    """What one instance holds: its locations, longest match first; never empty."""

    instance_id: str
    locations: tuple[LocationMatch, ...]

    @property
    def best(self) -> LocationMatch:
        return self.locations[0]


class LookupAnswer(msgspec.Struct, frozen=True):
    """Instances that hold at least one token, the longest match first."""

    event_id: str
    instances: tuple[InstanceMatch, ...]


class WorkerInfo(msgspec.Struct, frozen=True):
    """One rank of an instance. Times are seconds since the epoch."""

    instance_id: str
    worker_id: int
    ip: str
    port: int
    peer_init_url: str | None
    registration_time: float
    last_heartbeat_time: float
    alive: bool


EventState: TypeAlias = Literal[
    "queued", "running", "done", "partial", "failed", "cancelled", "expired"
]
"""``queued`` until the cache process has taken it on, then ``running``; the others are final."""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """An order for one instance: for a move, that which it goes to. A pin without a ``pin_id`` gets
    the id of its event.

    ``deadline_s``: it has ended by then, one way or the other; None: the controller's default for
    this order. The same ``idempotency_key`` with the same order is the same event.
    """

    instance_id: str
    order: Order
    deadline_s: float | None = None
    idempotency_key: str | None = None


class EventPart(msgspec.Struct, frozen=True):
    """Progress at one location, over all of ``worker_ids`` there, who hold each chunk together."""

    instance_id: str
    location: str
    worker_ids: tuple[int, ...]
    progress: Progress


class EventInfo(msgspec.Struct, frozen=True):
    """One operation, as far as it has come. Times are seconds since the epoch.

    ``tokens``: what it is about; once it has ended, what it took effect on. ``ratio``: bytes
    before by bytes after, where bytes were changed. ``message`` explains any state but ``done``.
    ``source``: instance and location that a move takes from; ``instance_id`` and ``location`` are
    where it goes to.
    """

    event_id: str
    operation: str
    instance_id: str
    location: str
    state: EventState
    tokens: int
    parts: tuple[EventPart, ...]
    ratio: float | None
    message: str
    created: float
    started: float | None
    ended: float | None
    deadline: float
    idempotency_key: str | None
    source: tuple[str, str] | None = None

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state not in ("queued", "running")


class InstancePin(msgspec.Struct, frozen=True):
    """A pin, and the instance where it is."""

    instance_id: str
    pin: PinInfo


class PinList(msgspec.Struct, frozen=True):
    """Pins of the instances that answered; ``unanswered`` did not."""

    pins: tuple[InstancePin, ...]
    unanswered: tuple[str, ...] = ()


class ControllerAPI(Protocol):
    """What a frontend may ask of the controller. Called on the controller's event loop.

    Errors are :class:`~lmcache_kit.errors.ControlError` and its kin: UnknownName, InvalidQuery,
    NoWorker, DeadlineExceeded, OperationFailed.
    """

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        """Answer from the index, without asking any worker. Raises UnknownName for an unknown
        instance and InvalidQuery for a token that is none."""
        ...

    async def health(self, instance_id: str) -> dict[int, int]:
        """Ask each worker; 0 means well, 1 that it reports an error. Empty while no rank has
        connected. Raises UnknownName, NoWorker or DeadlineExceeded."""
        ...

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        """Registered workers. Raises UnknownName for an unknown instance or worker."""
        ...

    def instance_at(self, ip: str) -> str | None:
        """The instance whose cache process registered from this address."""
        ...

    async def operate(self, operation: Operation) -> EventInfo:
        """Give an order; returns as soon as the cache process has taken it on.

        Raises what the cache process refused it with, NoWorker, or DeadlineExceeded; and
        ControlError for an idempotency key that stands for another order.
        """
        ...

    async def ended(self, event_id: str) -> EventInfo:
        """Wait for the end of an operation, which comes by its deadline."""
        ...

    async def cancel(self, event_id: str) -> EventInfo:
        """Stop an operation; it may take a while to end. Raises ControlError if it has ended
        otherwise already."""
        ...

    def event(self, event_id: str) -> EventInfo:
        """Raises UnknownName for an event that never was or is forgotten."""
        ...

    def events(self) -> list[EventInfo]:
        """All that are not forgotten, the latest first."""
        ...

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        """Ask one instance, or all that are alive."""
        ...

    def counters(self) -> Mapping[str, float]:
        """Metrics by name: names ending in ``_total`` only grow, the others are gauges."""
        ...


class Frontend(ABC):
    """A way into the controller. Built with the controller and its own options; started and
    stopped on the controller's event loop."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens, for the line that says so; empty until it has started."""
        return ()

    @abstractmethod
    async def start(self) -> None:
        """Begin to serve. Raises OSError when an address is taken."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop to serve; requests in flight are answered. Safe to call twice."""
