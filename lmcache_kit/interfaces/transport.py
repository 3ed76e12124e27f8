"""Transports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lmcache_kit.interfaces.memory import Region

if TYPE_CHECKING:
    import socket

Dial: TypeAlias = "Callable[[float], socket.socket]"
"""Takes seconds; returns a new connection, blocking and ready to use, to the peer's
:meth:`Transport.serve`. Raises OSError or TransportError."""

MAX_ADDRESS_BYTES = 64 * 1024
"""The most that :meth:`Transport.address` and :meth:`Transport.offer` return."""


class ReadableRegion(NamedTuple):
    """A region that is offered, and the xxh3-64 that its bytes had when they were stored."""

    region: Region
    checksum: int


class ReadResult(NamedTuple):
    """The bytes of region ``number`` are there. ``checksum``: their xxh3-64, if the
    transport computed it from the bytes as they came in; None: the reader has to."""

    number: int
    checksum: int | None = None


class Link(ABC):
    """A way to read from one peer. Used by one thread at a time, for one move after another."""

    @property
    @abstractmethod
    def how(self) -> str:
        """What the bytes go over, in a few words: ``"TCP"``, ``"CMA on one host"``."""

    @abstractmethod
    def read(self, offer: bytes, into: Sequence[Region], timeout_s: float) -> Iterator[ReadResult]:
        """Fill ``into``, regions of our own memory, with what the peer offered, in any order.

        Each region is named once, as soon as its bytes are all there. The caller may look at it
        while the next ones come in; it takes the iterator to its end. Raises TransferTimeout when
        not all have come within ``timeout_s`` seconds, and TransportError when the peer is gone,
        does not offer this (any more), or sends what is no answer. Except after a TransferTimeout
        that says otherwise (``settled``), nothing changes in ``into`` once this has ended.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up the connection; what is being read fails. Safe to call twice, from any thread."""


class Transport(ABC):
    """Moves bytes from the memory of one cache process into that of another.

    One per cache process, for its whole life. Built as ``target(memory, host)`` or, where the
    spec names a config model, ``target(memory, host, options)``: ``memory`` is all of this
    process's memory, writable and mapped until after :meth:`close`; ``host`` is the name or
    address that peers reach this process by. Building it may take time and raise TransportError;
    it happens on a thread of its own.

    The side that has bytes offers them and is passive; the side that wants them connects and reads.
    Thread-safe; every method may block, up to what its timeout says.
    """

    @abstractmethod
    def address(self) -> bytes:
        """What a peer's :meth:`connect` must know of this side."""

    @abstractmethod
    def offer(self, regions: Sequence[ReadableRegion]) -> bytes:
        """Let peers read these regions; what they pass to :meth:`Link.read`. It cannot be guessed,
        unless the transport cannot hide memory from its peers at all."""

    @abstractmethod
    def withdraw(self, offer: bytes) -> None:
        """End an offer. What is being sent of it is cut off, if need be by closing the connection.
        An unknown one is ignored."""

    @abstractmethod
    def connect(self, address: bytes, dial: Dial, timeout_s: float) -> Link:
        """Reach the peer that said ``address``, and see that bytes get through.

        Raises TransportError, whose message says why this transport does not serve for this peer.
        """

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Answer one peer on a connection that it dialled, until either side closes it. Owns the
        connection. Called on a thread of its own; never raises for a peer's doing."""

    @abstractmethod
    def close(self) -> None:
        """End every transfer and give everything back. Safe to call twice."""
