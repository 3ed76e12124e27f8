"""Frontends, and the controller as frontends see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from lmcache_kit.interfaces.operations import OperationRequest, OperationStatus, PinInfo

if TYPE_CHECKING:
    from lmcache_kit.metrics import MetricSet


class LookupQuery(msgspec.Struct, frozen=True):
    """Find the instances that hold the KV of these tokens.

    ``model`` and ``instance_id`` restrict the search unless they are None; ``cache_salt`` is
    exact. Tokens in an ``array("I")`` are looked up fastest.
    """

    tokens: Sequence[int]
    model: str | None = None
    cache_salt: str = ""
    instance_id: str | None = None


class LocationMatch(msgspec.Struct, frozen=True):
    """The number of tokens, counted from the first one without a gap, at one location.

    ``stopped`` tells why the match ends there: ``"end"`` (all tokens matched), ``"missing"`` (no
    location holds the next chunk) or ``"elsewhere"`` (another location does).
    """

    location: str
    tokens: int
    stopped: str


class InstanceMatch(msgspec.Struct, frozen=True):
    """The locations of one instance that match, longest match first; never empty."""

    instance_id: str
    locations: tuple[LocationMatch, ...]

    @property
    def best(self) -> LocationMatch:
        return self.locations[0]


class LookupAnswer(msgspec.Struct, frozen=True):
    """Instances that hold at least one token, longest match first.

    ``lookup_id`` names this lookup for clients of LMCache, whose every reply has an id.
    """

    lookup_id: str
    instances: tuple[InstanceMatch, ...]


class ModelInfo(msgspec.Struct, frozen=True):
    """A model whose KV an instance stores. Instances share KV of equal ``namespace``.

    ``model`` is its served name. ``weights`` and ``config`` identify its weights and its
    configuration, ``generation`` is set once the engine has dropped its cache, and ``namespace`` is
    the digest of all that KV depends on, as hex.
    """

    model: str
    weights: str
    config: str
    generation: str
    chunk_size: int
    namespace: str


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
    models: tuple[ModelInfo, ...] = ()


class OperationInfo(OperationStatus, frozen=True, kw_only=True):
    """The status of an operation, and which operation it is. Times are seconds since the epoch.

    ``instance_id`` and ``location`` are where the request went: for a move, its destination.
    ``source`` is the instance and location that a move takes from. ``worker_ids`` are the ranks
    at the location, each of which holds a part of every chunk.
    """

    operation_id: str
    kind: str
    instance_id: str
    location: str
    worker_ids: tuple[int, ...]
    created: float
    deadline: float
    started_at: float | None = None
    ended_at: float | None = None
    idempotency_key: str | None = None
    source: tuple[str, str] | None = None

    @property
    def ratio(self) -> float | None:
        """Bytes before by bytes after, for operations that change bytes."""
        before, after = self.progress.bytes_before, self.progress.bytes_after
        return before / after if before and after and self.source is None else None


class InstancePin(msgspec.Struct, frozen=True):
    """A pin, and its instance."""

    instance_id: str
    pin: PinInfo


class PinList(msgspec.Struct, frozen=True):
    """Pins of the instances that answered; ``unanswered`` names the others."""

    pins: tuple[InstancePin, ...]
    unanswered: tuple[str, ...] = ()


class InstancesAPI(Protocol):
    """Instances and the chunks they hold."""

    def lookup(self, query: LookupQuery) -> LookupAnswer:
        """Answer from the index, without asking any cache process.

        Raise UnknownName for an instance or a model that no cache process has registered, and
        InvalidQuery for an impossible token.
        """
        ...

    async def health(self, instance_id: str) -> dict[int, int]:
        """Ask each worker: 0 means healthy, 1 an error. Empty while no rank has connected.

        Raise UnknownName, NoWorker or DeadlineExceeded.
        """
        ...

    def workers(
        self, instance_id: str | None = None, worker_ids: Sequence[int] | None = None
    ) -> list[WorkerInfo]:
        """List registered workers. Raise UnknownName for an unknown instance or worker."""
        ...

    async def at_address(self, address: str) -> tuple[str, ...]:
        """Return the instances whose cache processes registered from this IP address or host name.

        Those that are alive come first, and of these the one that registered last.
        """
        ...


class OperationsAPI(Protocol):
    """Operations on what instances hold."""

    async def start(
        self,
        instance_id: str,
        request: OperationRequest,
        *,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        asked_by: str = "",
    ) -> OperationInfo:
        """Send a request to an instance, and return once its cache process has accepted it.

        A move goes to its destination. The operation ends within ``deadline_s`` seconds, one way
        or the other; None takes the controller's default for this kind. A second request with
        the same ``idempotency_key`` returns the operation of the first. The controller's log says
        that ``asked_by`` asked for it, such as the address of a client.

        Raise the cache process's refusal, NoWorker, DeadlineExceeded, OperationFailed, or
        ControlError for an idempotency key that stands for another request.
        """
        ...

    async def wait(self, operation_id: str) -> OperationInfo:
        """Wait for the end, which comes by the deadline. Raise UnknownName."""
        ...

    async def cancel(self, operation_id: str, *, asked_by: str = "") -> OperationInfo:
        """Stop an operation, which may take a while to end. ``asked_by``: see :meth:`start`.

        Raise UnknownName, or ControlError for an operation that has ended otherwise.
        """
        ...

    def get(self, operation_id: str) -> OperationInfo:
        """Return one operation. Raise UnknownName for one that is unknown or no longer kept."""
        ...

    def all(self) -> list[OperationInfo]:
        """List the operations that are kept, the latest first."""
        ...

    async def pins(self, instance_id: str | None = None, location: str | None = None) -> PinList:
        """Ask one instance, or all that are alive."""
        ...


class ControllerAPI(Protocol):
    """The controller for frontends: two halves, and its metrics. Call it on its event loop.

    Errors are :class:`~lmcache_kit.errors.ControlError` and its subclasses: UnknownName,
    InvalidQuery, NoWorker, DeadlineExceeded and OperationFailed.
    """

    @property
    def instances(self) -> InstancesAPI: ...

    @property
    def operations(self) -> OperationsAPI: ...

    @property
    def metrics(self) -> MetricSet: ...

    def counters(self) -> Mapping[str, float]:
        """Return the values of ``metrics``, by name."""
        ...


class Frontend(ABC):
    """A way into the controller, built with the controller and options of its own.

    It is started and stopped on the controller's event loop.
    """

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Addresses to print at the start; empty before that."""
        return ()

    @abstractmethod
    async def start(self) -> None:
        """Begin to serve. Raise OSError when an address is taken."""

    @abstractmethod
    async def stop(self) -> None:
        """Answer the requests in flight, then stop. Safe to call twice."""
