"""Operations: requests, their status, and the executor that carries them out in a cache process.

An operation is one request to one instance, with a status and exactly one end. The same types
serve at every floor: a frontend builds an :data:`OperationRequest`, the controller adds an id, a
deadline and an idempotency key (:mod:`lmcache_kit.controller.operation_log`), an
:class:`OperationExecutor` of the cache process carries the request out, and an
:class:`OperationStatus` comes back the same way. LMCache calls an operation an *event*; REST and
the command line keep its words (``event_id``, ``/events``), everything else says *operation*.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import msgspec


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of every request.

    ``location`` names a tier of the instance. ``tokens`` are packed as by
    :func:`lmcache_kit.keys.pack_tokens`; None means everything at the location. ``cache_salt``
    chooses among the namespaces, and so does ``model`` unless it is None.
    """

    location: str
    tokens: bytes | None = None
    cache_salt: str = ""
    model: str | None = None


class Pin(_Request, frozen=True, tag="pin"):
    """Keep the stored chunks of ``tokens`` until they are unpinned, or for ``ttl_s`` seconds.

    An empty ``pin_id`` becomes the id of the operation.
    """

    pin_id: str
    owner: str = ""
    ttl_s: float | None = None


class Unpin(_Request, frozen=True, tag="unpin"):
    """End the pin ``pin_id``, or all pins of the chunks of ``tokens``."""

    pin_id: str | None = None


class ListPins(_Request, frozen=True, tag="list_pins"):
    """List the pins of a location."""


class Clear(_Request, frozen=True, tag="clear"):
    """Delete chunks; pinned ones only with ``force``."""

    force: bool = False


class Compress(_Request, frozen=True, tag="compress"):
    """Encode chunks with the codec ``method``. Skip those that it has encoded already."""

    method: str


class Decompress(_Request, frozen=True, tag="decompress"):
    """Decode chunks that are encoded with ``method``."""

    method: str


class Peer(msgspec.Struct, frozen=True):
    """The source of a move in another cache process: its ``HOST:PORT`` and its incarnation.

    ``seal`` proves to the source that the controller wants this move; see
    :mod:`lmcache_kit.protocol.capability`.
    """

    operation_id: str
    url: str
    incarnation: bytes
    seal: bytes


class Move(_Request, frozen=True, tag="move"):
    """Bring chunks from ``source_location`` of the instance ``source`` to ``location``.

    The request goes to the destination. Afterwards the source deletes its chunks unless ``copy``.
    ``peer`` is filled in by the controller; it stays None when source and destination are tiers
    of one instance.
    """

    source: str
    source_location: str
    copy: bool = False
    peer: Peer | None = None


OperationRequest: TypeAlias = Pin | Unpin | ListPins | Clear | Compress | Decompress | Move


def kind(request: OperationRequest) -> str:
    """Return the name of a request's operation, such as ``pin``."""
    return str(type(request).__struct_config__.tag)


class PinInfo(msgspec.Struct, frozen=True):
    """A pin. ``expires_in_s`` is None for a pin without an end."""

    pin_id: str
    location: str
    tokens: int
    chunks: int
    nbytes: int
    owner: str
    expires_in_s: float | None


class Scope(msgspec.Struct, frozen=True):
    """The tokens and chunks that an accepted operation is about."""

    tokens: int
    chunks: int


class Transfer(msgspec.Struct, frozen=True):
    """How bytes came from another cache process.

    ``how`` names the transport's way and why a better one was not possible. ``seconds`` is the
    time during which any bytes were under way.
    """

    transport: str
    how: str = ""
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """0 before anything has arrived."""
        return self.nbytes / self.seconds if self.seconds else 0.0


class Progress(msgspec.Struct, frozen=True):
    """The chunks that are done, and their bytes before and after where an operation changes these.

    ``transfer`` is set for moves between cache processes.
    """

    chunks_done: int = 0
    chunks: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    transfer: Transfer | None = None


OperationState: TypeAlias = Literal[
    "queued", "running", "done", "partial", "failed", "cancelled", "expired"
]
"""``queued`` until the cache process has accepted the request, then ``running``; all others are
final, and a final state never changes."""


class OperationStatus(msgspec.Struct, frozen=True):
    """The state of an operation.

    ``tokens`` counts those that the operation is about; after the end, exactly those on which it
    took effect. ``message`` explains any state but ``done``, and what was left unchanged.
    ``pins`` answers :class:`Pin` and :class:`ListPins`.
    """

    state: OperationState
    tokens: int = 0
    progress: Progress = Progress()
    message: str = ""
    pins: tuple[PinInfo, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state not in ("queued", "running")


class OperationListener(Protocol):
    """Receives the course of one operation. Methods may be called from any thread, without locks.

    ``accepted`` comes at most once, ``progressed`` any number of times between ``accepted`` and
    ``ended``, and ``ended`` exactly once: also without ``accepted``, and after a cancel or the
    deadline (``expired``).
    """

    def accepted(self, scope: Scope) -> None:
        """The operation has begun, and this is its scope."""
        ...

    def progressed(self, progress: Progress) -> None:
        """More chunks are done. Only the last call counts."""
        ...

    def ended(self, status: OperationStatus) -> None:
        """The operation has ended. Its state is final."""
        ...


class RunningOperation(Protocol):
    """An operation that can be stopped."""

    def cancel(self) -> None:
        """Stop soon, and keep what is done."""
        ...


class OperationExecutor(Protocol):
    """Carries out requests in the cache process."""

    def start(
        self, request: OperationRequest, *, deadline_s: float, listener: OperationListener
    ) -> RunningOperation | None:
        """Start without waiting for the work, which may call ``listener`` before this returns.

        Return None for an operation that cannot be stopped. Raise UnknownName for a location or
        method, and another ControlError for a request that cannot be carried out.
        """
        ...
