"""Registry of peers: NIXL knows each peer once, links share it by a reference count."""

from __future__ import annotations

import threading

from lmcache_kit.errors import TransportError
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.wire import Address


class Peer:
    """One incarnation of another cache process.

    ``links`` counts the open links. ``lost`` is the reason why it cannot be read any more.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.links = 0
        self.lost = ""


class Peers:
    """Peers by the name of their agent. Thread-safe."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._known: dict[str, Peer] = {}

    def acquire(self, address: Address) -> Peer:
        """Return the peer and count one link more. Raises TransportError for a bad address."""
        with self._lock:
            peer = self._known.get(address.agent)
            if peer is None:
                self._agent.add(address.agent, address.metadata)
                peer = self._known[address.agent] = Peer(address)
            elif peer.address != address:
                raise TransportError(f"two peers have the name {address.agent}")
            peer.links += 1
            return peer

    def release(self, peer: Peer) -> None:
        """Count one link less; remove the peer with its last link."""
        with self._lock:
            peer.links -= 1
            if not peer.links:
                self._forget(peer)

    def mark_lost(self, peer: Peer, why: str) -> None:
        """Mark the peer as lost after a failed read: its links fail, a new link adds it again."""
        with self._lock:
            peer.lost = peer.lost or why
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        if self._known.get(peer.address.agent) is peer:
            del self._known[peer.address.agent]
            self._agent.remove(peer.address.agent)
