"""Open the backends that the configuration names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.tiers.reopening_backend import ReopeningBackend
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.errors import BackendError, ConfigError, KitError, PluginBroken, PluginNotFound
from lmcache_kit.first_party import DEFAULT_MEMORY_BACKEND, distribution_of
from lmcache_kit.interfaces import Backend, MemoryBackend
from lmcache_kit.plugins.options import validated

if TYPE_CHECKING:
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.config import KitConfig
    from lmcache_kit.plugins import Plugins

MEMORY = "memory"
"""Capability of backends that can be the first tier."""
OPEN_S = 5.0
"""How long a start waits for its tiers to open; one that takes longer joins later."""

_B = TypeVar("_B", Backend, MemoryBackend)


def build_engine(config: KitConfig, plugins: Plugins) -> tuple[MemoryBackend, CacheEngine]:
    """Return the first tier and an engine over it.

    Raises ConfigError and PluginError, and BackendError when there is no such memory here now.
    """
    policy = plugins.eviction_policy(config.cache_policy)
    memory = open_memory(config, plugins)
    engine = CacheEngine(
        memory,
        policy,
        location=config.memory_backend,
        lease_ttl_s=config.lease_ttl_s,
        max_pinned_share=config.max_pinned_share,
    )
    return memory, engine


def open_memory(config: KitConfig, plugins: Plugins) -> MemoryBackend:
    """Open the first tier. Raises as :func:`memory_factory`, and BackendError."""
    make = memory_factory(config, plugins)
    return _opened(config.memory_backend, make, MemoryBackend)  # type: ignore[type-abstract]


def build_tiers(config: KitConfig, plugins: Plugins, get_codec: GetCodec) -> list[StoreTier]:
    """Return the tiers below memory, for a start that does not wait for any of them.

    A tier that cannot be opened, or not within ``OPEN_S``, is down, and is tried again. Raises
    ConfigError and PluginError for what the configuration has wrong.
    """
    opened = {
        name: ReopeningBackend(
            partial(open_backend, plugins, name, options),
            shared=_is_shared(backend_factory(plugins, name, options)),
        )
        for name, options in config.lower_tiers.items()
    }
    try:
        _open_all(opened)
        return [
            StoreTier(
                backend,
                plugins.eviction_policy(config.cache_policy),
                location=name,
                get_codec=get_codec,
                max_pinned_share=config.max_pinned_share,
            )
            for name, backend in opened.items()
        ]
    except BaseException:
        for backend in opened.values():
            backend.close()
        raise


def _open_all(backends: Mapping[str, ReopeningBackend]) -> None:
    """Try to open all, each on a thread of its own. Raises ConfigError that a backend raises."""
    wrong: list[ConfigError] = []

    def attempt(backend: ReopeningBackend) -> None:
        try:
            backend.open()
        except ConfigError as error:
            wrong.append(error)
        except BackendError:
            pass  # its tier meets it again, and logs it

    threads = [
        threading.Thread(target=attempt, args=(each,), name=f"lmcache-kit-open-{name}", daemon=True)
        for name, each in backends.items()
    ]
    deadline = time.monotonic() + OPEN_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if wrong:
        raise wrong[0]


def _is_shared(make: Callable[[], Backend]) -> bool:
    """Whether the class of a backend says so. A function does not: what it returns will."""
    target = make.func if isinstance(make, partial) else make
    return bool(getattr(target, "shared", False))


def open_backend(plugins: Plugins, name: str, options: Mapping[str, Any]) -> Backend:
    """Open a tier. Raises as :func:`backend_factory`, and BackendError if it cannot be opened."""
    make = backend_factory(plugins, name, options)
    return _opened(name, make, Backend)  # type: ignore[type-abstract]


def memory_factory(config: KitConfig, plugins: Plugins) -> Callable[[], MemoryBackend]:
    """Return a function that opens the first tier.

    Raises ConfigError for a backend without the capability ``"memory"`` and for wrong options, and
    PluginError for one that is not installed or does not work here.
    """
    name = config.memory_backend
    offers = [each for each in plugins.specs("backend") if MEMORY in each.spec.capabilities]
    names = [each.spec.name for each in offers]
    installed = f"Installed: {', '.join(names) or 'none'}"
    try:
        spec = plugins.spec("backend", name)
    except PluginNotFound as error:
        if distribution_of("backend", name):
            raise  # the hint says how to install it
        if DEFAULT_MEMORY_BACKEND not in names:
            pip = f"pip install {distribution_of('backend', DEFAULT_MEMORY_BACKEND)}"
            installed = f"{installed}. The default comes with: {pip}"
        raise PluginNotFound(f"memory_backend: {error.message}", hint=installed) from error
    if MEMORY not in spec.capabilities:
        raise ConfigError(f"memory_backend: {name} is no memory", hint=installed)
    target: Callable[..., MemoryBackend] = plugins.resolve("backend", name)
    options = config.backend_options.get(name)
    arguments = [validated("backend_options", "backend", spec, options)] if options else []
    return partial(target, config.max_local_cpu_bytes, *arguments)


def backend_factory(
    plugins: Plugins, name: str, options: Mapping[str, Any]
) -> Callable[[], Backend]:
    """Return a function that opens a tier.

    Raises ConfigError for memory and for wrong options, and PluginError for a backend that is not
    installed or does not work here.
    """
    target: Callable[..., Backend] = plugins.resolve("backend", name)
    spec = plugins.spec("backend", name)
    if MEMORY in spec.capabilities:
        raise ConfigError(f"tiers: {name} is memory, and no tier below it")
    if not options:
        return target
    return partial(target, validated("backend_options", "backend", spec, options))


def _opened(name: str, make: Callable[[], _B], expected: type[_B]) -> _B:
    try:
        backend = make()
    except ConfigError:
        raise
    except KitError as error:
        raise BackendError(
            f"backend {name!r} cannot be opened: {error.message}", hint=error.hint
        ) from error
    except Exception as error:  # plugin code: name the backend, whatever it raises
        raise BackendError(
            f"backend {name!r} cannot be opened: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(backend, expected):
        raise PluginBroken(
            f"backend {name!r} cannot be opened: {backend!r} is no {expected.__name__}"
        )
    return backend
