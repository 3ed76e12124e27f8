"""Compose a cache from a configuration, and serve it."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import secrets
import signal
import socket as sockets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

import lmcache_kit
from lmcache_kit.agent.metrics import AGENT
from lmcache_kit.errors import CacheUnavailable, PluginBroken, TransportError
from lmcache_kit.process import paths

if TYPE_CHECKING:
    from lmcache_kit.agent.agent import Agent
    from lmcache_kit.cache.tiers.lower_tiers import LowerTiers
    from lmcache_kit.config import KitConfig
    from lmcache_kit.peer.move_executor import MoveExecutor
    from lmcache_kit.peer.service import PeerService
    from lmcache_kit.protocol.local import Hello
    from lmcache_kit.protocol.zmq_auth import WorkerKeys
    from lmcache_kit.service.codecs import Codecs
    from lmcache_kit.service.operations import EngineExecutor

logger = logging.getLogger(__name__)

REMIND_AFTER_S = 10.0
END_S = 30.0
"""A process that takes longer to end dumps its stacks, which show what hangs, and exits."""


def serve(
    config: KitConfig,
    *,
    socket: Path,
    linger_s: float | None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve at ``socket`` until SIGTERM, SIGINT, or ``linger_s`` without a client.

    Runs on the main thread. Raises ConfigError or PluginError when no cache can be composed,
    BackendError when there is no memory for it, CacheStartFailed when the socket's folder cannot be
    used, and CacheUnavailable when another process serves there.
    """
    paths.secure_directory(socket.parent)
    lock = paths.serving_lock(socket)
    if lock is None:
        raise CacheUnavailable(
            f"another cache process serves at {str(socket)!r}",
            hint="Stop it, or choose another lmcache_instance_id or cache_socket",
        )
    with lock:
        CacheService(config, linger_s=linger_s).run(
            socket, on_ready, signals=(signal.SIGTERM, signal.SIGINT)
        )


def settings_digest(config: KitConfig) -> str:
    """Return a digest of the keys that a cache process reads, by their declared scope.

    Two cache processes of one instance with the same digest are interchangeable.
    """
    settings = config.cache_settings_json()
    return blake3(f"{lmcache_kit.__version__} {settings}".encode()).hexdigest(16)


class CacheService:
    """A composed cache. Raises as :func:`serve`; call :meth:`run` or :meth:`close` afterwards."""

    def __init__(self, config: KitConfig, *, linger_s: float | None = None) -> None:
        # Deferred: plugins and the engine take time to import, and clients need none of them.
        from lmcache_kit.cache.namespaces import NamespaceRegistry
        from lmcache_kit.interfaces import CacheInfo
        from lmcache_kit.peer.move_executor import MoveContext, MoveExecutor
        from lmcache_kit.plugins import Plugins
        from lmcache_kit.process.server import CacheServer
        from lmcache_kit.service.background_encoder import BackgroundEncoder
        from lmcache_kit.service.build import build_engine, build_tiers
        from lmcache_kit.service.codecs import Codecs
        from lmcache_kit.service.operations import EngineExecutor

        self._made_at = time.monotonic()
        self.config = config
        self.incarnation = secrets.token_hex(16)
        self._plugins = Plugins.load()
        codecs = Codecs(self._plugins, config.codec_options)
        self.memory, self.engine = build_engine(config, self._plugins)
        self._tiers: LowerTiers | None = None
        self.namespaces = NamespaceRegistry()
        self._agent: Agent | None = None
        self._encoder: BackgroundEncoder | None = None
        self._peer: PeerService | None = None
        self._moves: MoveExecutor | None = None
        self.executor: EngineExecutor | None = None
        try:
            if config.tiers:
                self._tiers = self.engine.attach(
                    build_tiers(config, self._plugins, codecs.make), codecs.make
                )
            self._peer = self._make_peer(codecs)
            self._moves = MoveExecutor(
                MoveContext(
                    self.engine,
                    self.namespaces,
                    self._confirm,
                    self._peer.access if self._peer else None,
                )
            )
            self.executor = EngineExecutor(
                self.engine,
                codecs,
                namespaces=self.namespaces,
                moves=self._moves,
                pin_ttl_s=config.pin_timeout_sec or None,
            )
            if config.store_codec:
                with suppress(PluginBroken):  # chunks stay raw, and the encoder logs why
                    codecs.make(config.store_codec)
                self._encoder = BackgroundEncoder(
                    self.engine,
                    codecs,
                    config.store_codec,
                    then=self._tiers.enqueue_write if self._tiers else lambda _: None,
                )
            elif self._tiers:
                self.engine.memory_tier.subscribe(self._tiers)
            self._agent = self._make_agent()
        except BaseException:
            self.close()
            raise
        self._info = CacheInfo(config.lmcache_instance_id, self.incarnation, config.locations)
        self._server = CacheServer(
            self.engine,
            self.memory,
            instance_id=config.lmcache_instance_id,
            incarnation=self.incarnation,
            linger_s=linger_s,
            settings=settings_digest(config),
            on_hello=self._register,
            more_stats=self._more_stats,
        )

    def run(
        self,
        path: Path,
        on_ready: Callable[[], None] | None = None,
        *,
        signals: Sequence[signal.Signals] = (),
    ) -> None:
        """Serve at ``path``, whose serving lock the caller holds, until stopped; then close."""
        with ExitStack() as ending:
            ending.callback(self.close)
            listener = paths.listen(path)
            ending.callback(listener.close)
            self._plugins.cache_opened(self._info)
            ending.callback(self._plugins.cache_closing, self._info)
            if self._tiers:
                self._tiers.start()
            if self._peer:
                self._peer.start()
            if self._agent:
                self._agent.start()
                ending.callback(self._agent.stop)
            logger.info(
                "cache process %d serves instance %r at %s: %s of %.2f GiB%s, %s, incarnation %s",
                os.getpid(),
                self.config.lmcache_instance_id,
                path,
                self.config.memory_backend,
                self.config.max_local_cpu_size,
                "".join([f", {name}" for name in self.config.tiers]),
                self.config.cache_policy,
                self.incarnation,
            )
            asyncio.run(self._serve(listener, on_ready, signals))
            logger.info("cache process %d ends: %s", os.getpid(), self._server.why_ended)
            if signals:  # it is a process of its own
                faulthandler.dump_traceback_later(END_S, exit=True)

    def stop(self) -> None:
        """Make :meth:`run` return, from any thread."""
        self._server.stop_from_thread()

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        if self._moves:
            self._moves.close()
        if self._peer:
            self._peer.close()
        if self.executor:
            self.executor.close()
        if self._encoder:
            self._encoder.close()
        if self._tiers:
            self._tiers.close()
        self.engine.close()

    async def _serve(
        self,
        listener: sockets.socket,
        on_ready: Callable[[], None] | None,
        signals: Sequence[signal.Signals],
    ) -> None:
        loop = asyncio.get_running_loop()
        for each in signals:
            loop.add_signal_handler(each, self._server.stop, each.name)
        await self._server.serve(listener, on_ready)

    def _make_peer(self, codecs: Codecs) -> PeerService | None:
        if not self.config.enable_p2p:
            return None
        from lmcache_kit.peer.service import PeerService

        try:
            return PeerService(
                self.config,
                self._plugins,
                self.memory,
                self.engine,
                namespaces=self.namespaces,
                get_codec=codecs.make,
                incarnation=bytes.fromhex(self.incarnation),
            )
        except TransportError as error:
            logger.error("nothing moves from or to this instance until a restart: %s", error)
            return None

    def _make_agent(self) -> Agent | None:
        config, peer = self.config, self._peer
        if not config.enable_controller or not config.controller_url:
            return None
        from lmcache_kit.agent.agent import Agent

        return Agent(
            tuple(self.engine.locations.values()),
            url=config.controller_url,
            instance_id=config.lmcache_instance_id,
            incarnation=bytes.fromhex(self.incarnation),
            host=sockets.gethostname(),
            heartbeat_s=config.lmcache_worker_heartbeat_time,
            worker_ports=config.lmcache_worker_ports or (),
            peer_url=peer.url if peer else None,
            peer_key=peer.key if peer else b"",
            executor=self.executor,
            keys=worker_keys(config),
        )

    def _confirm(self, location: str, timeout_s: float) -> bool:
        return bool(self._agent and self._agent.confirm(location, timeout_s))

    def _register(self, hello: Hello) -> None:
        if hello.role == "worker" and hello.rank == 0:
            self._remind()
        if hello.namespace is not None:
            self.namespaces.register(hello.namespace)
        if self._agent is None:
            return
        ranks = self.config.lmcache_worker_ids
        if hello.role == "worker" and (ranks is None or hello.rank in ranks):
            self._agent.register_worker(hello.rank)
        if hello.namespace is not None:
            self._agent.register_namespace(hello.namespace)

    def _remind(self) -> None:
        """Log which tiers are down, for a vLLM that has just come and reads warnings from now on.

        The first one to come has read it when the tiers were opened.
        """
        if time.monotonic() - self._made_at >= REMIND_AFTER_S:
            for tier in self._tiers or ():
                if tier.store.why_down:
                    logger.warning("%s still does not work: %s", tier.location, tier.store.why_down)

    def _more_stats(self) -> dict[str, float]:
        stats = self._agent.stats() if self._agent else {}
        more = {f"{AGENT.prefix}{name}": value for name, value in stats.items()}
        for part in (self._encoder, self._peer):
            more |= part.stats() if part else {}
        return more


def worker_keys(config: KitConfig) -> WorkerKeys | None:
    """Load the key files that the configuration names; None without. Raises ConfigError."""
    if not config.enable_controller or not config.controller_key or not config.worker_key:
        return None
    from lmcache_kit.protocol.zmq_auth import WorkerKeys

    return WorkerKeys.load(config.controller_key, config.worker_key)
