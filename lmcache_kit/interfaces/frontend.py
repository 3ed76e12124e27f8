"""Frontends, and what the controller offers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec


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


class ControllerAPI(Protocol):
    """What a frontend may ask of the controller. Called on the controller's event loop.

    Errors are :class:`~lmcache_kit.errors.ControlError` and its kin: UnknownName, NoWorker,
    DeadlineExceeded.
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
