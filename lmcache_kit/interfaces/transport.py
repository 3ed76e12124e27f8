"""Contract of transports between cache processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lmcache_kit.interfaces.memory import Region

if TYPE_CHECKING:
    import socket

Dial: TypeAlias = "Callable[[float], socket.socket]"
"""Function from a time-out in seconds to a new connection to the peer's :meth:`Transport.serve`,
blocking and ready to use. Raises OSError or TransportError."""

MAX_ADDRESS_BYTES = 64 * 1024
"""Most bytes of the result of :meth:`Transport.address` and :meth:`Transport.offer`."""


class ReadableRegion(NamedTuple):
    """A region to offer, and the xxh3-64 of its bytes when they were stored."""

    region: Region
    checksum: int


class ReadResult(NamedTuple):
    """All bytes of region ``number`` have arrived.

    ``checksum`` is their xxh3-64 if the transport computed it as they arrived, or None: the reader
    then computes it.
    """

    number: int
    checksum: int | None = None


class Link(ABC):
    """A connection to read from one peer. Used by one thread at a time, for many moves."""

    @property
    @abstractmethod
    def how(self) -> str:
        """What the bytes go over, in a few words: ``"TCP"``, ``"CMA on one host"``."""

    @abstractmethod
    def read(self, offer: bytes, into: Sequence[Region], timeout_s: float) -> Iterator[ReadResult]:
        """Fill ``into``, regions of this process's memory, with the offered regions, in any order.

        Yields each region once, as soon as all its bytes have arrived. The caller may use the
        region while the next ones arrive, and takes the iterator to its end. Raises TransferTimeout
        when not all have arrived within ``timeout_s`` seconds, and TransportError when the peer is
        gone, the offer is unknown or withdrawn, or the peer's answer is invalid. No byte of
        ``into`` changes after the end, except after a TransferTimeout that is not ``settled``.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection; a read in flight fails. Safe to call twice, from any thread."""


class Transport(ABC):
    """Move bytes from the memory of one cache process to that of another.

    One per cache process, for its whole life. Built as ``target(memory, host)`` or, if the spec
    names a config model, ``target(memory, host, options)``. ``memory`` is the whole memory of this
    process, writable and mapped until after :meth:`close`. ``host`` is the name or address by which
    peers reach this process. The constructor runs on a thread of its own, may block, and may raise
    TransportError.

    The source offers regions and is passive; the reader connects and reads. Thread-safe. Every
    method may block, up to its time-out.
    """

    @abstractmethod
    def address(self) -> bytes:
        """Return the address of this side, for a peer's :meth:`connect`."""

    @abstractmethod
    def offer(self, regions: Sequence[ReadableRegion]) -> bytes:
        """Let peers read these regions; return the offer, which they pass to :meth:`Link.read`.

        An offer cannot be guessed, unless the transport cannot hide memory from peers at all.
        """

    @abstractmethod
    def withdraw(self, offer: bytes) -> None:
        """End an offer, and cut off reads of it, if need be by closing their connections.

        An unknown offer is ignored.
        """

    @abstractmethod
    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        """Connect to the peer of ``address``, and verify that bytes get through.

        Raises TransportError; its message says why this transport cannot reach this peer.
        """

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Answer a peer on a connection that the peer has dialled, until either side closes it.

        Owns the connection. Called on a thread of its own; a peer cannot make it raise.
        """

    @abstractmethod
    def close(self) -> None:
        """End every transfer and release all resources. Safe to call twice."""
