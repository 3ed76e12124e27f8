"""A link: reads from one peer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces.memory import Region
from lmcache_kit.interfaces.transport import Link, ReadResult
from lmcache_kit_nixl_transport import wire
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.batches import plan_batches
from lmcache_kit_nixl_transport.peers import Peer, Peers
from lmcache_kit_nixl_transport.pipelined_read import PipelinedRead
from lmcache_kit_nixl_transport.wire import Span


class NixlLink(Link):
    """Read from one peer.

    An iterator of :meth:`read` that is dropped before its end waits for its transfers in flight, up
    to its time-out, and then raises TransferTimeout as a complete one does.
    """

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
        remote = self._peer.address.slab
        offered = wire.decode_offer(offer)
        wire.check_inside(offered, remote.nbytes, "the peer's")
        wire.check_inside(into, self._slab.nbytes, "this process's")
        if [region.nbytes for region in offered] != [region.nbytes for region in into]:
            raise TransportError(
                f"the peer offers {len(offered)} regions whose sizes differ from the "
                f"{len(into)} regions to fill"
            )
        self._agent.sweep()
        reading = PipelinedRead(
            self._agent,
            self._peer.address.agent,
            into=into,
            batches=plan_batches(into, self._slab.address, offered, remote.address),
            check=self._check,
            deadline=deadline,
        )
        return self._mark_lost_on_error(reading)

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._peers.release(self._peer)

    def _mark_lost_on_error(self, reading: PipelinedRead) -> Iterator[ReadResult]:
        try:
            yield from reading
        except TransportError as error:
            if not isinstance(error, TransferTimeout) and not self._closed:
                self._peers.mark_lost(self._peer, error.message)
            raise

    def _check(self) -> None:
        if self._closed:
            raise TransportError("this link is closed", hint="Connect again")
        if self._peer.lost:
            raise TransportError(f"the peer was lost: {self._peer.lost}", hint="Connect again")
