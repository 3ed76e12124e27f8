"""The peer that a move takes from, as who takes sees it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
from lmcache_kit.errors import ControlError, OperationFailed, ProtocolError, TransportError
from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.peer import Answer, Question, Welcome

ANSWER_S = 10.0
OPEN_S = 8.0

Connect = Callable[[float], socket.socket]
"""Takes seconds; a new connection to the peer's port. Raises TransportError."""
_A = TypeVar("_A", bound=Answer)


class SourceClient:
    """A move that a peer has agreed to, over one connection; ``name`` is for messages.

    Every call raises TransportError when the peer does not answer in time, or has gone, and
    OperationFailed when it refuses.
    """

    def __init__(self, connection: socket.socket, name: str, welcome: Welcome) -> None:
        self.welcome = welcome
        self.name = name
        self._connection = connection

    @classmethod
    def open(cls, connect: Connect, name: str, opened: wire.Open, timeout_s: float) -> SourceClient:
        """Show the claim; what it comes to is :attr:`welcome`."""
        deadline = time.monotonic() + min(timeout_s, OPEN_S)
        connection = connect(deadline - time.monotonic())
        try:
            welcome = _ask(connection, name, opened, Welcome, deadline)
        except BaseException:
            connection.close()
            raise
        return cls(connection, name, welcome)

    def holdings(self) -> list[ChunkRef]:
        """All that the claim comes to."""
        found = list(self.welcome.first)
        while len(found) < self.welcome.chunks:
            more = self._ask(wire.ListMore(len(found)), wire.Listing).holdings
            if not more:
                raise TransportError(f"{self.name} lists {len(found)} of {self.welcome.chunks}")
            found += more
        return found

    def lend(self, keys: Sequence[ChunkKey], transport: str) -> wire.Lent:
        """Have the peer hold these chunks, those of them that are still there, and have a
        transport of it offer them."""
        lent = self._ask(wire.Lend(tuple(keys), transport), wire.Lent)
        if not {parcel.key for parcel in lent.parcels} <= set(keys):
            raise TransportError(f"{self.name} lends what it was not asked for")
        return lent

    def offer(self, lease: int, transport: str, parcels: Sequence[int]) -> bytes:
        """Have a transport of the peer offer parcels of a loan."""
        return self._ask(wire.Offer(lease, transport, tuple(parcels)), wire.Offered).offer

    def recheck(self, keys: Sequence[ChunkKey]) -> None:
        """Have the peer look whether it holds what it says, and drop what is corrupt."""
        self._ask(wire.Recheck(tuple(keys)), wire.Done)

    def give_back(self, lease: int) -> None:
        """End a loan."""
        self._ask(wire.GiveBack(lease), wire.Done)

    def forget(self, keys: Sequence[ChunkKey]) -> DeleteResult:
        """Have the peer delete what is here now."""
        return self._ask(wire.Forget(tuple(keys)), wire.HasForgotten).forgotten

    def close(self) -> None:
        """Hang up. Safe to call twice, and from any thread."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _ask(self, question: Question, kind: type[_A]) -> _A:
        return _ask(self._connection, self.name, question, kind, time.monotonic() + ANSWER_S)


def attach(
    connect: Connect, name: str, transport: str, token: bytes, timeout_s: float
) -> socket.socket:
    """A connection to a transport of the peer. Raises TransportError."""
    deadline = time.monotonic() + timeout_s
    connection = connect(timeout_s)
    try:
        asked = wire.Attach(wire.VERSION, transport, token)
        _ask(connection, name, asked, wire.Attached, deadline)
    except ControlError as error:
        connection.close()
        raise TransportError(str(error)) from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def _ask(
    connection: socket.socket, name: str, question: Question, kind: type[_A], deadline: float
) -> _A:
    left_s = max(0.001, deadline - time.monotonic())
    try:
        wire.send(connection, question, left_s)
        answer = wire.receive_answer(connection, max(0.001, deadline - time.monotonic()))
    except TimeoutError as error:
        raise TransportError(f"{name} does not answer") from error
    except (OSError, ProtocolError) as error:
        raise TransportError(f"{name} has gone: {error}") from error
    if isinstance(answer, wire.No):
        raise OperationFailed(f"{name} refuses: {answer.why[:1000]}")
    if not isinstance(answer, kind):
        raise TransportError(f"{name} answers {type(question).__name__} with {answer!r:.100}")
    return answer
