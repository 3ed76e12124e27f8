"""A way to one peer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.interfaces.transport import Link, ReadResult
from lmcache_kit_nixl_transport import wire
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.batches import plan
from lmcache_kit_nixl_transport.peers import Peer, Peers
from lmcache_kit_nixl_transport.reading import Reading
from lmcache_kit_nixl_transport.wire import Span


class NixlLink(Link):
    """A way to one peer. An iterator of :meth:`read` that is dropped before its end waits for what
    it has begun, up to its time-out, and then raises TransferTimeout like one that is not."""

    def __init__(self, agent: Agent, peers: Peers, peer: Peer, slab: Span, how: str) -> None:
        self._agent = agent
        self._peers = peers
        self._peer = peer
        self._slab = slab
        self._how = how
        self._lock = threading.Lock()
        self._closed = False

    @property
    def how(self) -> str:
        return self._how

    def read(self, offer: bytes, into: Sequence[Region], timeout_s: float) -> Iterator[ReadResult]:
        deadline = time.monotonic() + timeout_s
        theirs = self._peer.address.slab
        offered = wire.decode_offer(offer)
        wire.check_inside(offered, theirs.nbytes, "the peer's")
        wire.check_inside(into, self._slab.nbytes, "this process's")
        if [region.nbytes for region in offered] != [region.nbytes for region in into]:
            raise TransportError("what the peer offers has other sizes than what is to be filled")
        self._agent.sweep()
        reading = Reading(
            self._agent,
            self._peer.address.agent,
            into=into,
            batches=plan(into, self._slab.address, offered, theirs.address),
            check=self._check,
            deadline=deadline,
        )
        return self._watched(reading)

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._peers.leave(self._peer)

    def _watched(self, reading: Reading) -> Iterator[ReadResult]:
        try:
            yield from reading
        except TransportError as error:
            if not isinstance(error, TransferTimeout) and not self._closed:
                self._peers.lose(self._peer, error.message)
            raise

    def _check(self) -> None:
        if self._closed:
            raise TransportError("this link is closed")
        if self._peer.lost:
            raise TransportError(f"the peer was lost: {self._peer.lost}", hint="Connect again")
