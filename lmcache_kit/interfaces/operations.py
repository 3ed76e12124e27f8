"""Orders of the control plane, and who carries them out in the cache process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import msgspec


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    """``location``: the backend it is about. ``tokens``: packed; None means everything there.
    ``cache_salt`` chooses among the namespaces; ``model`` does if it is not None."""

    location: str
    tokens: bytes | None = None
    cache_salt: str = ""
    model: str | None = None


class Pin(_Order, frozen=True, tag="pin"):
    """Keep what is stored of ``tokens`` until it is unpinned, or for ``ttl_s`` seconds."""

    pin_id: str
    owner: str = ""
    ttl_s: float | None = None


class Unpin(_Order, frozen=True, tag="unpin"):
    """End the pin ``pin_id``, or all pins of the chunks of ``tokens``."""

    pin_id: str | None = None


class ListPins(_Order, frozen=True, tag="list_pins"):
    """Tell which pins there are."""


class Clear(_Order, frozen=True, tag="clear"):
    """Forget chunks; pinned ones only if ``force``."""

    force: bool = False


class Compress(_Order, frozen=True, tag="compress"):
    """Encode chunks with the codec ``method``; chunks that are encoded so already stay."""

    method: str


class Decompress(_Order, frozen=True, tag="decompress"):
    """Decode chunks that are encoded with ``method``."""

    method: str


class Peer(msgspec.Struct, frozen=True):
    """The cache process that a move takes from: ``HOST:PORT``, and which life of it is meant.
    ``seal`` proves to it that the controller wants this move; see
    :mod:`lmcache_kit.protocol.capability`."""

    event_id: str
    url: str
    incarnation: bytes
    seal: bytes


class Move(_Order, frozen=True, tag="move"):
    """Fetch what instance ``source`` holds at ``source_location``, and have it forget that
    afterwards unless ``copy``. An order to the instance that it goes to; ``location`` is there.
    ``peer`` is filled in by the controller; None for a move from one location of an instance to
    another."""

    source: str
    source_location: str
    copy: bool = False
    peer: Peer | None = None


Order: TypeAlias = Pin | Unpin | ListPins | Clear | Compress | Decompress | Move


class PinInfo(msgspec.Struct, frozen=True):
    """A pin. ``expires_in_s`` is None for one without an end."""

    pin_id: str
    location: str
    tokens: int
    chunks: int
    nbytes: int
    owner: str
    expires_in_s: float | None


class Accepted(msgspec.Struct, frozen=True):
    """An order is understood; ``tokens`` and ``chunks`` are what it is about."""

    tokens: int
    chunks: int


class Transfer(msgspec.Struct, frozen=True):
    """How bytes came from another cache process. ``how``: over what, and why not otherwise.
    ``seconds``: for how long some were under way."""

    transport: str
    how: str = ""
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """0 before anything has come."""
        return self.nbytes / self.seconds if self.seconds else 0.0


class Progress(msgspec.Struct, frozen=True):
    """How far an order has come. Bytes of the chunks done, before and after, where these change.
    ``transfer`` is of moves."""

    chunks_done: int = 0
    chunks: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    transfer: Transfer | None = None


class Outcome(msgspec.Struct, frozen=True):
    """How an order ended. ``tokens``: what it took effect on, exactly. ``message`` explains any
    state but ``done``, and what was left as it was."""

    state: Literal["done", "partial", "failed", "cancelled", "expired"]
    tokens: int = 0
    progress: Progress = Progress()
    message: str = ""
    pins: tuple[PinInfo, ...] = ()


class Job(Protocol):
    """An order being carried out."""

    @property
    def accepted(self) -> Accepted | None:
        """None while that is not known yet; a report comes when it is."""
        ...

    def cancel(self) -> None:
        """Stop soon; what is done stays done."""
        ...


class Operator(Protocol):
    """Carries out orders in the cache process."""

    def begin(
        self,
        order: Order,
        *,
        deadline_s: float,
        report: Callable[[Progress], None],
        finish: Callable[[Outcome], None],
    ) -> Job:
        """Begin, without waiting for the work. ``report`` and ``finish`` are called from any
        thread; ``finish`` exactly once, also after a cancel or the deadline (``expired``), and
        possibly before this returns.

        Raises UnknownName for a location or method, and ControlError for what cannot be done.
        """
        ...
