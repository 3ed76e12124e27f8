"""Find what a configuration has wrong, without opening anything.

A mistake stays one on every machine and at every time: a name that no plugin provides, an option
that does not exist, a key file that is none. Trouble of this machine, such as a folder that cannot
be written, is no mistake: serving goes on without what it concerns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from lmcache_kit.errors import ConfigError, KitError, PluginBroken, PluginError
from lmcache_kit.process.paths import socket_path
from lmcache_kit.service.build import backend_factory, memory_factory
from lmcache_kit.service.codecs import Codecs
from lmcache_kit.service.service import worker_keys

if TYPE_CHECKING:
    from lmcache_kit.config import KitConfig, Loaded
    from lmcache_kit.plugins import Plugins

Attempt: TypeAlias = Callable[[], object]
"""Use a value of a configuration. Raises ConfigError or PluginError for a mistake."""


def check(loaded: Loaded, plugins: Plugins, *, as_client: bool = False) -> None:
    """Raise ConfigError that names all mistakes, each with its key and where that is set.

    ``as_client``: with ``cache_process: attach``, pass over what only the cache process reads. It
    may have plugins that this environment lacks.
    """
    attaches = as_client and loaded.config.cache_process == "attach"
    attempts = _of_clients(loaded.config) if attaches else _all(loaded.config, plugins)
    found = [_with_origin(error, key, loaded.origins) for key, error in _mistakes(attempts)]
    if found:
        hint = found[0].hint if len(found) == 1 else ""
        lines = [found[0].message] if len(found) == 1 else [str(each) for each in found]
        raise ConfigError("; ".join(dict.fromkeys(lines)), hint=hint)


def _mistakes(attempts: Iterable[tuple[str, Attempt]]) -> Iterator[tuple[str, KitError]]:
    """Yield each mistake and the key that it concerns."""
    for key, attempt in attempts:
        try:
            attempt()
        except (ConfigError, PluginError) as error:
            yield key, error


def _of_clients(config: KitConfig) -> Iterator[tuple[str, Attempt]]:
    yield "cache_socket", partial(socket_path, config)


def _all(config: KitConfig, plugins: Plugins) -> Iterator[tuple[str, Attempt]]:
    yield from _of_clients(config)
    yield "memory_backend", partial(memory_factory, config, plugins)
    for name, options in config.lower_tiers.items():
        yield "tiers", partial(backend_factory, plugins, name, options)
    yield "cache_policy", partial(plugins.eviction_policy, config.cache_policy)
    if config.store_codec:
        yield "store_codec", partial(_check_codec, config, plugins, config.store_codec)
    yield "worker_key", partial(worker_keys, config)
    if config.enable_p2p:
        yield "transfer_channel", partial(_check_transports, config, plugins)
        yield "p2p_tls_cert", partial(_check_tls, config)


def _check_codec(config: KitConfig, plugins: Plugins, name: str) -> None:
    try:
        Codecs(plugins, config.codec_options).make(name)
    except PluginBroken:  # chunks stay raw, and the cache process logs why
        plugins.spec("codec", name)


def _check_transports(config: KitConfig, plugins: Plugins) -> None:
    from lmcache_kit.peer.transports import Transports

    Transports(
        plugins,
        config.transfer_channel,
        memoryview(b""),
        config.p2p_host,
        config.transport_options,
    )


def _check_tls(config: KitConfig) -> None:
    from lmcache_kit.peer.service import load_tls

    load_tls(config)


def _with_origin(error: KitError, key: str, origins: Mapping[str, str]) -> KitError:
    """Return the error with the key that it names, or else ``key``, and the key's origin."""
    first, _, rest = error.message.partition(": ")
    key, message = (first, rest) if first in origins else (key, error.message)
    return ConfigError(f"{key} ({origins.get(key, 'default')}): {message}", hint=error.hint)
