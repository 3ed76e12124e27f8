"""Transports: read KV from the memory of another cache process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lmcache_kit.interfaces.memory import Region

if TYPE_CHECKING:
    import socket

Dial: TypeAlias = "Callable[[float], socket.socket]"
"""Takes a timeout in seconds; returns a new, blocking connection to the peer's
:meth:`Transport.serve`. Raises OSError or TransportError."""

MAX_ADDRESS_BYTES = 64 * 1024
"""Most bytes of the result of :meth:`Transport.address` and :meth:`Transport.offer`."""


class ReadableRegion(NamedTuple):
    """An offered region, and the xxh3-64 of its bytes as they were stored."""

    region: Region
    checksum: int


class ReadResult(NamedTuple):
    """All bytes of region ``number`` have been read.

    ``checksum`` is their xxh3-64 if the transport computed it from the bytes as they arrived; None
    leaves that to the reader.
    """

    number: int
    checksum: int | None = None


class Link(ABC):
    """Reads from one peer. Used by one thread at a time, for one move after another."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What the bytes travel over, in a few words: ``"TCP"``, ``"CMA on one host"``."""

    @abstractmethod
    def read(self, offer: bytes, into: Sequence[Region], timeout_s: float) -> Iterator[ReadResult]:
        """Fill ``into``, regions of this process's memory, with the offered ones, in any order.

        Yield each region once, as soon as all its bytes are there. The caller may look at it while
        others are being read, and takes the iterator to its end. Raises TransferTimeout when not
        all bytes arrived within ``timeout_s`` seconds, and TransportError when the peer is gone,
        does not offer these regions (any more), or breaks the protocol. Once this has ended,
        nothing in ``into`` changes, except after a TransferTimeout whose ``settled`` says so.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection; a read under way fails. Safe to call twice, from any thread."""


class Transport(ABC):
    """Transfers bytes from the memory of one cache process into that of another.

    One per cache process, for its whole life. Built as ``target(memory, host)`` or, where the
    spec names a config model, ``target(memory, host, options)``. ``memory`` is all of this
    process's memory, writable and mapped until after :meth:`close`. ``host`` is the name or
    address that peers reach this process by. Building a transport may take time and raise
    TransportError; it happens on a thread of its own.

    The source offers regions and is passive; the destination connects and reads. Thread-safe;
    every method may block, up to its timeout.
    """

    @abstractmethod
    def address(self) -> bytes:
        """Return what a peer passes to :meth:`connect` to reach this process."""

    @abstractmethod
    def offer(self, regions: Sequence[ReadableRegion]) -> bytes:
        """Let peers read these regions; return what they pass to :meth:`Link.read`.

        It cannot be guessed, unless the transport cannot hide memory from its peers at all.
        """

    @abstractmethod
    def withdraw(self, offer: bytes) -> None:
        """End an offer; ignore one that is unknown.

        Reads of it under way are cut off, if need be by closing their connections.
        """

    @abstractmethod
    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        """Connect to the peer with this ``address``, and see that bytes get through.

        Raises TransportError with the reason why this transport does not reach this peer.
        """

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Answer one peer on a connection that it dialled, until either side closes it.

        Owns the connection. Called on a thread of its own; never raises for what a peer does.
        """

    @abstractmethod
    def close(self) -> None:
        """End every transfer and free all resources. Safe to call twice."""
