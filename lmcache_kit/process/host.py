"""Composition: from a configuration to a cache that serves."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket as sockets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

import lmcache_kit
from lmcache_kit.errors import CacheUnavailable
from lmcache_kit.process import paths

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.config import KitConfig
    from lmcache_kit.control.agent import Agent
    from lmcache_kit.control.curve import WorkerKeys
    from lmcache_kit.interfaces import MemoryBackend
    from lmcache_kit.plugins import Plugins
    from lmcache_kit.process.operations import EngineOperator
    from lmcache_kit.process.protocol import Hello

logger = logging.getLogger(__name__)

_SETTINGS = {
    "cache_linger_s",
    "cache_policy",
    "codec_options",
    "controller_key",
    "controller_url",
    "enable_controller",
    "lease_ttl_s",
    "lmcache_worker_heartbeat_time",
    "lmcache_worker_ids",
    "lmcache_worker_ports",
    "local_cpu",
    "max_local_cpu_size",
    "max_pinned_share",
    "pin_timeout_sec",
    "store_codec",
    "worker_key",
}


def serve(
    config: KitConfig,
    *,
    socket: Path,
    linger_s: float | None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Be the cache process of ``socket`` until SIGTERM, SIGINT, or ``linger_s`` without a client.

    Runs on the main thread. Raises ConfigError or PluginError when no cache can be composed, and
    CacheUnavailable when another process serves there.
    """
    paths.secure_directory(socket.parent)
    lock = paths.serving_lock(socket)
    if lock is None:
        raise CacheUnavailable(
            f"another cache process serves at {str(socket)!r}",
            hint="Stop it, or choose another lmcache_instance_id or cache_socket",
        )
    with lock:
        Host(config, linger_s=linger_s).run(
            socket, on_ready, signals=(signal.SIGTERM, signal.SIGINT)
        )


def settings_digest(config: KitConfig) -> str:
    """Stands for all that makes one cache process differ from another of the same instance."""
    used = config.model_dump_json(include=_SETTINGS)
    return blake3(f"{lmcache_kit.__version__} {used}".encode()).hexdigest(16)


class Host:
    """A composed cache. Raises as :func:`serve`; :meth:`run` or :meth:`close` must follow."""

    def __init__(self, config: KitConfig, *, linger_s: float | None = None) -> None:
        # Deferred: plugins and the engine take time to import, and clients need none of them.
        from lmcache_kit.interfaces import CacheInfo
        from lmcache_kit.process.background import BackgroundEncoder
        from lmcache_kit.process.codecs import Codecs
        from lmcache_kit.process.operations import EngineOperator
        from lmcache_kit.process.server import CacheServer

        self.config = config
        self.incarnation = secrets.token_hex(16)
        self._plugins, self.memory, self.engine = _compose(config)
        codecs = Codecs(self._plugins, config.codec_options)
        self.operator = EngineOperator(
            self.engine, codecs, pin_ttl_s=config.pin_timeout_sec or None
        )
        self._encoder: BackgroundEncoder | None = None
        try:
            if config.store_codec:
                codecs.make(config.store_codec)
                self._encoder = BackgroundEncoder(self.engine, codecs, config.store_codec)
            self._agent = _agent(config, self.engine, self.operator, self.incarnation)
        except BaseException:
            self.close()
            raise
        self._info = CacheInfo(config.lmcache_instance_id, self.incarnation, (config.location,))
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
            if self._agent:
                self._agent.start()
                ending.callback(self._agent.stop)
            logger.info(
                "cache process %d serves instance %r at %s: %s of %.2f GiB, %s, incarnation %s",
                os.getpid(),
                self.config.lmcache_instance_id,
                path,
                self.config.location,
                self.config.max_local_cpu_size,
                self.config.cache_policy,
                self.incarnation,
            )
            asyncio.run(self._serve(listener, on_ready, signals))
            logger.info("cache process %d ends: %s", os.getpid(), self._server.why_ended)

    def stop(self) -> None:
        """Make :meth:`run` return, from any thread."""
        self._server.stop_from_thread()

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        self.operator.close()
        if self._encoder:
            self._encoder.close()
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

    def _register(self, hello: Hello) -> None:
        if hello.namespace is not None:
            self.operator.register_namespace(hello.namespace)
        if self._agent is None:
            return
        ranks = self.config.lmcache_worker_ids
        if hello.role == "worker" and (ranks is None or hello.rank in ranks):
            self._agent.register_worker(hello.rank)
        if hello.namespace is not None:
            self._agent.register_namespace(hello.namespace)

    def _more_stats(self) -> dict[str, float]:
        stats = self._agent.stats() if self._agent else {}
        more = {f"agent_{name}": value for name, value in stats.items()}
        return {**more, **(self._encoder.stats() if self._encoder else {})}


def _compose(config: KitConfig) -> tuple[Plugins, MemoryBackend, CacheEngine]:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.plugins import Plugins

    plugins = Plugins.load()
    backend = plugins.resolve("backend", config.location)
    policy = plugins.eviction_policy(config.cache_policy)
    memory: MemoryBackend = backend(capacity_bytes=config.max_local_cpu_bytes)
    engine = CacheEngine(
        memory,
        policy,
        location=config.location,
        lease_ttl_s=config.lease_ttl_s,
        max_pinned_share=config.max_pinned_share,
    )
    return plugins, memory, engine


def _agent(
    config: KitConfig, engine: CacheEngine, operator: EngineOperator, incarnation: str
) -> Agent | None:
    if not config.enable_controller or not config.controller_url:
        return None
    from lmcache_kit.control.agent import Agent

    return Agent(
        engine,
        url=config.controller_url,
        instance_id=config.lmcache_instance_id,
        incarnation=bytes.fromhex(incarnation),
        host=sockets.gethostname(),
        heartbeat_s=config.lmcache_worker_heartbeat_time,
        worker_ports=config.lmcache_worker_ports or (),
        operator=operator,
        keys=worker_keys(config),
    )


def worker_keys(config: KitConfig) -> WorkerKeys | None:
    """What the configuration names; None without keys. Raises ConfigError."""
    if not config.enable_controller or not config.controller_key or not config.worker_key:
        return None
    from lmcache_kit.control.curve import WorkerKeys

    return WorkerKeys.load(config.controller_key, config.worker_key)
