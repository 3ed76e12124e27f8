"""The composition of what a cache process needs to exchange chunks with others."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.errors import ProtocolError
from lmcache_kit.peer.chunk_receiver import Destination
from lmcache_kit.peer.link_pool import LinkPool
from lmcache_kit.peer.move_server import SEND_S, Identity, MoveServer
from lmcache_kit.peer.priority import lower_priority
from lmcache_kit.peer.promotion import ROOM_S
from lmcache_kit.peer.quarantine import Quarantine
from lmcache_kit.peer.remote_source import PeerAccess
from lmcache_kit.peer.sockets import HANDSHAKE_S, Listener, Tls, dial
from lmcache_kit.peer.transports import Transports
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.capability import CAPABILITY_KEY_BYTES
from lmcache_kit.protocol.framing import version_mismatch

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.cache.namespaces import NamespaceRegistry
    from lmcache_kit.config import KitConfig
    from lmcache_kit.interfaces import MemoryBackend
    from lmcache_kit.plugins import Plugins

log = logging.getLogger(__name__)

QUARANTINE_SHARE = 8
"""At most this part of the memory may wait for unsettled transfers of one transport."""
EXPIRE_EVERY_S = 15.0
_LOOPBACK = ("localhost", "127.", "::1")


class PeerService:
    """This process as a peer: its port, its transports and its links.

    It listens at :attr:`url` from the start, and answers from :meth:`start` on. Moves take from
    other peers by :attr:`access`. ``room_s``: how long a move out of a tier waits for room in
    memory.

    Raises ConfigError and PluginError for a configuration that cannot be served, and TransportError
    when the port cannot be had.
    """

    def __init__(
        self,
        config: KitConfig,
        plugins: Plugins,
        memory: MemoryBackend,
        engine: CacheEngine,
        *,
        namespaces: NamespaceRegistry,
        get_codec: GetCodec,
        incarnation: bytes,
        room_s: float = ROOM_S,
    ) -> None:
        self.key = secrets.token_bytes(CAPABILITY_KEY_BYTES)
        tls = load_tls(config)
        self._transports = Transports(
            plugins,
            config.transfer_channel,
            memory.memory,
            config.p2p_host,
            config.transport_options,
        )
        self._quarantine = Quarantine(
            engine.transfers, memory.usage().capacity_bytes // QUARANTINE_SHARE
        )
        self._links = LinkPool(self._transports, blocked=self._quarantine.blocked)
        self._hashing = ThreadPoolExecutor(
            1, thread_name_prefix="lmcache-kit-hash", initializer=lower_priority
        )
        self._server = MoveServer(
            Identity(config.lmcache_instance_id, incarnation, self.key),
            engine,
            namespaces,
            self._transports,
            idle_s=config.lease_ttl_s,
            room_s=room_s,
        )
        self.access = PeerAccess(
            config.lmcache_instance_id,
            Destination(engine, self._quarantine, self._hashing, get_codec),
            self._links,
            partial(_dial, tls),
        )
        port = config.p2p_init_ports[0] if config.p2p_init_ports else 0
        self._listener = Listener(config.p2p_host, port, self._answer, tls=tls)
        self._closing = threading.Event()
        self._expiry = threading.Thread(
            target=self._expire_links, name="lmcache-kit-links", daemon=True
        )
        if tls is None and not config.p2p_host.startswith(_LOOPBACK):
            log.warning("KV goes unencrypted over %s; p2p_tls_cert encrypts it", config.p2p_host)

    @property
    def url(self) -> str:
        """``HOST:PORT`` of the peer port."""
        return self._listener.url

    def start(self) -> None:
        """Begin to answer, and to make transports."""
        self._transports.start()
        self._listener.start()
        self._expiry.start()

    def stats(self) -> dict[str, float]:
        """Return gauges."""
        return {"quarantined_bytes": float(self._quarantine.nbytes)}

    def close(self) -> None:
        """Close the port, the links and the transports.

        To be called after the end of all moves and before the engine's. Safe to call twice.
        """
        self._closing.set()
        self._listener.close()
        self._links.close()
        self._transports.close()
        self._quarantine.close()
        self._hashing.shutdown()
        if self._expiry.is_alive():
            self._expiry.join()

    def _answer(self, connection: socket.socket) -> None:
        try:
            first = wire.receive_request(connection, HANDSHAKE_S, first=True)
            if not isinstance(first, wire.Open | wire.Attach):
                return
            if why := version_mismatch(first.version, wire.VERSION):
                wire.send(connection, wire.Refused(why), SEND_S)
            elif isinstance(first, wire.Open):
                self._server.serve(connection, first)
            else:
                self._attach(connection, first)
        except ProtocolError as error:
            log.warning("closed a peer's connection: %s", error)

    def _attach(self, connection: socket.socket, request: wire.Attach) -> None:
        transport = self._transports.get(request.transport)
        if not self._server.may_attach(request.token):
            wire.send(connection, wire.Refused("no move has this token"), SEND_S)
        elif isinstance(transport, str):
            why = f"transport {request.transport}: {transport}"
            wire.send(connection, wire.Refused(why), SEND_S)
        else:
            wire.send(connection, wire.Attached(), SEND_S)
            connection.settimeout(None)
            lower_priority()
            transport.serve(connection)

    def _expire_links(self) -> None:
        while not self._closing.wait(EXPIRE_EVERY_S):
            with contextlib.suppress(OSError):
                self._links.expire()


def _dial(tls: Tls | None, url: str, timeout_s: float) -> socket.socket:
    return dial(url, timeout_s, tls)


def load_tls(config: KitConfig) -> Tls | None:
    """Load the files that the configuration names; None without. Raises ConfigError."""
    files = (config.p2p_tls_cert, config.p2p_tls_key, config.p2p_tls_ca)
    cert, key, authority = (str(each) for each in files)
    return Tls.load(cert, key, authority) if all(files) else None
