"""The source of a move between instances: a location of another cache process."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
from lmcache_kit.errors import ControlError, TransportError
from lmcache_kit.interfaces.operations import Move, Peer, Transfer
from lmcache_kit.keys import ChunkKey, Namespace
from lmcache_kit.peer.chunk_receiver import ChunkReceiver, Destination
from lmcache_kit.peer.compatibility import difference
from lmcache_kit.peer.move_source import MoveStats
from lmcache_kit.peer.source_client import Connect, SourceClient
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.capability import Capability

if TYPE_CHECKING:
    import socket

    from lmcache_kit.peer.link_pool import LinkPool, PooledLink

CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class PeerAccess:
    """How this cache process reaches its peers.

    ``dial`` takes a peer's ``HOST:PORT`` and a timeout in seconds.
    """

    instance_id: str
    destination: Destination
    links: LinkPool
    dial: Callable[[str, float], socket.socket]


class RemoteSource:
    """See :class:`~lmcache_kit.peer.move_source.MoveSource`.

    The protocol of one move, as :mod:`lmcache_kit.protocol.peer` carries it:
    open -> for each window (lease -> offer -> read -> verify -> release) -> delete.
    Between the last release and the delete the controller confirms that it knows the copies.
    """

    def __init__(
        self,
        access: PeerAccess,
        client: SourceClient,
        incarnation: bytes,
        connect: Connect,
        ours: Sequence[Namespace],
    ) -> None:
        self.name = client.name
        self.window_bytes = client.welcome.window_bytes
        self.chunks, self.incompatible = _compatible(client, ours)
        self._access = access
        self._client = client
        self._incarnation = incarnation
        self._connect = connect
        self._sizes = {info.digest: info.chunk_size for info in client.welcome.namespaces}
        self._receiver: ChunkReceiver | None = None
        self._link_in_use: PooledLink | None = None
        self._aborted = False

    @classmethod
    def open(
        cls,
        access: PeerAccess,
        request: Move,
        peer: Peer,
        *,
        namespaces: Sequence[Namespace],
        timeout_s: float,
    ) -> RemoteSource:
        """Show the controller's capability to the peer that a request names.

        ``namespaces`` are the base namespaces of the workers here. Raises TransportError when the
        peer cannot be reached, OperationFailed when it refuses, and ControlError when nothing
        that it has is of use here.
        """
        connect = partial(access.dial, peer.url)
        capability = Capability.of(request, peer.operation_id, access.instance_id)
        opening = wire.Open(
            wire.VERSION, capability, peer.signature, peer.incarnation, tuple(namespaces)
        )
        name = f"instance {request.source!r}"
        client = SourceClient.open(connect, name, opening, timeout_s)
        try:
            return cls(access, client, peer.incarnation, connect, namespaces)
        except BaseException:
            client.close()
            raise

    def chunk_size(self, namespace: bytes) -> int:
        return self._sizes[namespace]

    def transfer(self, stats: MoveStats) -> Transfer | None:
        if self._receiver is None:
            return None
        link = self._receiver.link
        return Transfer(link.transport, link.description, stats.nbytes, stats.seconds)

    def receive(
        self, keys: Sequence[ChunkKey], *, owner: Hashable, stats: MoveStats, timeout_s: float
    ) -> None:
        deadline = time.monotonic() + timeout_s
        if self._receiver is None:
            self._receiver = ChunkReceiver(
                self._access.destination,
                self._client,
                self._acquire(deadline),
                lambda: self._acquire(deadline, fresh=True),
                owner=owner,
                stats=stats,
            )
        self._receiver.receive(keys, timeout_s)

    def end_receiving(self) -> None:
        link, self._link_in_use = self._link_in_use, None
        if link is not None:
            self._access.links.release(link)

    def delete(self, keys: Sequence[ChunkKey]) -> DeleteResult:
        return self._client.delete(keys)

    def abort(self) -> None:
        self._aborted = True
        self._client.close()
        if link := self._link_in_use:
            with contextlib.suppress(TransportError):
                link.link.close()

    def close(self) -> None:
        self._client.close()
        link, self._link_in_use = self._link_in_use, None
        if link is not None:
            with contextlib.suppress(TransportError):
                link.link.close()

    def _acquire(self, deadline: float, *, fresh: bool = False) -> PooledLink:
        timeout_s = min(CONNECT_S, max(0.001, deadline - time.monotonic()))
        link = self._access.links.acquire(
            self._client, self._incarnation, self._connect, timeout_s=timeout_s, fresh=fresh
        )
        self._link_in_use = link
        if self._aborted:
            raise TransportError("the move was cancelled")
        return link


def _compatible(
    client: SourceClient, ours: Sequence[Namespace]
) -> tuple[Sequence[ChunkRef], Mapping[str, int]]:
    """Return the chunks that workers here can use, and the reasons against the others, counted.

    Raises ControlError when there are chunks, and none is of use.
    """
    welcome, chunks = client.welcome, client.chunks()
    reasons = {
        info.digest: difference(info, welcome.base_namespaces, ours) for info in welcome.namespaces
    }
    incompatible = Counter(why for chunk in chunks if (why := reasons.get(chunk.namespace)))
    usable = [chunk for chunk in chunks if reasons.get(chunk.namespace) == ""]
    if chunks and not usable:
        raise ControlError(f"{client.name} holds what is of no use here: {'; '.join(incompatible)}")
    return usable, incompatible
