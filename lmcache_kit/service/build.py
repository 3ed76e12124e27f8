"""Backends, as the configuration asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.errors import ConfigError, PluginBroken
from lmcache_kit.interfaces import Backend, MemoryBackend
from lmcache_kit.plugins.options import validated

if TYPE_CHECKING:
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.config import KitConfig
    from lmcache_kit.plugins import Plugins


def make_engine(config: KitConfig, plugins: Plugins) -> tuple[MemoryBackend, CacheEngine]:
    """The first tier. Raises ConfigError and PluginError."""
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
    return memory, engine


def make_tiers(config: KitConfig, plugins: Plugins, get_codec: GetCodec) -> list[StoreTier]:
    """Those below it, all or none. Raises ConfigError and PluginError."""
    tiers: list[StoreTier] = []
    try:
        for name, options in config.lower_tiers.items():
            tiers.append(
                StoreTier(
                    make_backend(plugins, name, options),
                    plugins.eviction_policy(config.cache_policy),
                    location=name,
                    get_codec=get_codec,
                    max_pinned_share=config.max_pinned_share,
                )
            )
    except BaseException:
        for tier in tiers:
            tier.close()
        raise
    return tiers


def make_backend(plugins: Plugins, name: str, options: Mapping[str, Any]) -> Backend:
    """One backend, opened. Raises as :func:`backend_of`, and PluginBroken where it cannot be."""
    make = backend_of(plugins, name, options)
    try:
        backend = make()
    except ConfigError:
        raise
    except Exception as error:  # a backend is somebody's plugin: say whose, whatever it raises
        raise PluginBroken(f"backend {name!r} cannot be opened: {error}") from error
    if not isinstance(backend, Backend):
        raise PluginBroken(f"backend {name!r} cannot be opened: {backend!r} is no Backend")
    return backend


def backend_of(plugins: Plugins, name: str, options: Mapping[str, Any]) -> Callable[[], Backend]:
    """What opens a backend. Raises ConfigError for one that is no tier and for options, and
    PluginError for one that is not there."""
    target: Callable[..., Backend] = plugins.resolve("backend", name)
    spec = plugins.spec("backend", name)
    if "memory" in spec.capabilities:
        raise ConfigError(f"tiers: {name} is memory, and no tier below it")
    if not options:
        return target
    return partial(target, validated("backend_options", "backend", spec, options))
