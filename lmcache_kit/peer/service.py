"""Composition: what a cache process needs to take part in moves, and who answers at its port."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.errors import ProtocolError
from lmcache_kit.peer.chunk_receiver import Destination
from lmcache_kit.peer.link_pool import LinkPool
from lmcache_kit.peer.move_executor import MoveContext, MoveExecutor
from lmcache_kit.peer.move_server import SEND_S, Identity, MoveServer
from lmcache_kit.peer.priority import lower_priority
from lmcache_kit.peer.quarantine import Quarantine
from lmcache_kit.peer.sockets import GREET_S, Listener, Tls, dial
from lmcache_kit.peer.transports import Transports
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.capability import KEY_BYTES

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.cache.namespaces import NamespaceRegistry
    from lmcache_kit.config import KitConfig
    from lmcache_kit.interfaces import MemoryBackend
    from lmcache_kit.plugins import Plugins

log = logging.getLogger(__name__)

QUARANTINE_SHARE = 8
"""At most this part of the memory may wait for transfers of one transport to settle."""
TIDY_S = 15.0
_LOOPBACK = ("localhost", "127.", "::1")


class PeerService:
    """This process as a peer. It listens at :attr:`url` from the start, and answers from
    :meth:`start` on. ``mover`` carries out orders to take.

    Raises ConfigError and PluginError for a configuration that cannot be served.
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
        confirm: Callable[[str, float], bool],
    ) -> None:
        self.key = secrets.token_bytes(KEY_BYTES)
        tls = _tls(config)
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
        place = Destination(engine, self._quarantine, self._hashing, get_codec)
        self._source = MoveServer(
            Identity(config.lmcache_instance_id, incarnation, self.key),
            engine,
            namespaces,
            self._transports,
            idle_s=config.lease_ttl_s,
        )
        tools = MoveContext(
            config.lmcache_instance_id,
            place,
            namespaces,
            self._links,
            partial(_dial, tls),
            confirm,
        )
        port = config.p2p_init_ports[0] if config.p2p_init_ports else 0
        self._listener = Listener(config.p2p_host, port, self._answer, tls=tls)
        self.mover = MoveExecutor(tools)
        self._closing = threading.Event()
        self._tidying = threading.Thread(target=self._tidy, name="lmcache-kit-tidy", daemon=True)
        if tls is None and not config.p2p_host.startswith(_LOOPBACK):
            log.warning("KV goes unencrypted over %s; p2p_tls_cert encrypts it", config.p2p_host)

    @property
    def url(self) -> str:
        """``HOST:PORT`` of the peer port."""
        return self._listener.url

    def start(self) -> None:
        """Begin to take part."""
        self._transports.start()
        self._listener.start()
        self._tidying.start()

    def stats(self) -> dict[str, float]:
        """Gauges."""
        return {"quarantined_bytes": float(self._quarantine.nbytes)}

    def close(self) -> None:
        """Take part no longer; to be called before the engine is closed. Safe to call twice."""
        self._closing.set()
        self.mover.close()
        self._listener.close()
        self._links.close()
        self._transports.close()
        self._quarantine.close()
        self._hashing.shutdown()
        if self._tidying.is_alive():
            self._tidying.join()

    def _answer(self, connection: socket.socket) -> None:
        try:
            first = wire.receive_question(connection, GREET_S, first=True)
            if isinstance(first, wire.Open | wire.Attach) and first.version != wire.VERSION:
                why = f"peers here speak version {wire.VERSION}, not {first.version}"
                wire.send(connection, wire.No(why), SEND_S)
            elif isinstance(first, wire.Open):
                self._source.serve(connection, first)
            elif isinstance(first, wire.Attach):
                self._attach(connection, first)
        except ProtocolError as error:
            log.warning("hung up on a peer: %s", error)

    def _attach(self, connection: socket.socket, asked: wire.Attach) -> None:
        transport = self._transports.get(asked.transport)
        if not self._source.may_attach(asked.token):
            wire.send(connection, wire.No("no move goes on by this token"), SEND_S)
        elif isinstance(transport, str):
            wire.send(connection, wire.No(f"transport {asked.transport}: {transport}"), SEND_S)
        else:
            wire.send(connection, wire.Attached(), SEND_S)
            connection.settimeout(None)
            lower_priority()
            transport.serve(connection)

    def _tidy(self) -> None:
        while not self._closing.wait(TIDY_S):
            with contextlib.suppress(OSError):
                self._links.expire()


def _dial(tls: Tls | None, url: str, timeout_s: float) -> socket.socket:
    return dial(url, timeout_s, tls)


def _tls(config: KitConfig) -> Tls | None:
    files = (config.p2p_tls_cert, config.p2p_tls_key, config.p2p_tls_ca)
    cert, key, authority = (str(each) for each in files)
    return Tls.load(cert, key, authority) if all(files) else None
