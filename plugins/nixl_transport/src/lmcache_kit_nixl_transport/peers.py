"""The peers that NIXL knows: each once, however many links lead there."""

from __future__ import annotations

import threading

from lmcache_kit.errors import TransportError
from lmcache_kit_nixl_transport.agent import Agent
from lmcache_kit_nixl_transport.wire import Address


class Peer:
    """One incarnation of another cache process. ``lost``: why it cannot be read any more."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.links = 0
        self.lost = ""


class Peers:
    """Thread-safe."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._known: dict[str, Peer] = {}

    def join(self, address: Address) -> Peer:
        """One link more to this peer. Raises TransportError if its address is refused."""
        with self._lock:
            peer = self._known.get(address.agent)
            if peer is None:
                self._agent.add(address.agent, address.metadata)
                peer = self._known[address.agent] = Peer(address)
            elif peer.address != address:
                raise TransportError(f"two peers go by the name {address.agent}")
            peer.links += 1
            return peer

    def leave(self, peer: Peer) -> None:
        """One less."""
        with self._lock:
            peer.links -= 1
            if not peer.links:
                self._forget(peer)

    def lose(self, peer: Peer, why: str) -> None:
        """Reading failed: its links are dead, and the next one starts afresh."""
        with self._lock:
            peer.lost = peer.lost or why
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        if self._known.get(peer.address.agent) is peer:
            del self._known[peer.address.agent]
            self._agent.remove(peer.address.agent)
