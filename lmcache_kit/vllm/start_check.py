"""Check the kit's configuration where vLLM builds its own, before it loads a model.

vLLM's front process is the first to know the whole configuration, and the only one whose error ends
a start at once and stays visible. vLLM has no hook there for a connector, so the end of
``VllmConfig``'s construction is made to call :func:`check`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lmcache_kit.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

_MULTI = "MultiConnector"
_MODULE = "lmcache_kit.vllm"


def install(config_class: type, names: Iterable[str]) -> None:
    """Let ``config_class`` call :func:`check` with its ``kv_transfer_config``, once it is built.

    ``names``: of connectors that are the kit's.
    """
    known = frozenset(names)
    original: Callable[..., None] = config_class.__post_init__  # type: ignore[attr-defined]
    # A second call replaces the first one's names.
    original = getattr(original, "_before_lmcache_kit", original)

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        check(self.kv_transfer_config, known)

    post_init._before_lmcache_kit = original  # type: ignore[attr-defined]
    config_class.__post_init__ = post_init  # type: ignore[attr-defined]


def check(transfer: KVTransferConfig | None, names: Iterable[str]) -> None:
    """Raise ConfigError that names all mistakes of the kit's connectors in this configuration."""
    if transfer is None:
        return
    for extra in _extras(transfer, frozenset(names)):
        _check_extra(extra)


def _extras(transfer: KVTransferConfig, names: frozenset[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the extra configuration of each connector that is the kit's."""
    extra = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector == _MULTI:
        for child in extra.get("connectors") or []:
            name, module = child.get("kv_connector"), child.get("kv_connector_module_path")
            if _is_ours(name, module, names):
                yield child.get("kv_connector_extra_config") or {}
    elif _is_ours(transfer.kv_connector, transfer.kv_connector_module_path, names):
        yield extra


def _is_ours(name: str | None, module: str | None, names: frozenset[str]) -> bool:
    if module:
        return module == _MODULE or module.startswith(f"{_MODULE}.")
    return name in names


def _check_extra(extra: Mapping[str, Any]) -> None:
    # Deferred: vLLM imports this in each of its processes, whatever connector it uses.
    from lmcache_kit.config import load_config
    from lmcache_kit.plugins import Plugins
    from lmcache_kit.service import mistakes

    plugins = Plugins.load(log_failures=False)
    try:
        mistakes.check(load_config(extra=extra, plugins=plugins), plugins, as_client=True)
    except ConfigError as error:
        raise ConfigError(
            f"lmcache_kit's configuration cannot be used: {error.message}", hint=error.hint
        ) from None
