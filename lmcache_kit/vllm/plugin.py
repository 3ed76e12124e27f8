"""Entry point of group ``vllm.general_plugins``: registers the connector with vLLM.

vLLM calls the entry point in each of its processes, and an exception in it would end every start of
vLLM on this machine, cached or not. Therefore :func:`register` never raises, and imports nothing
but what vLLM has imported already: its connector factory, and its configuration, which is told to
check the kit's own (:mod:`lmcache_kit.vllm.start_check`).
"""

from __future__ import annotations

import logging
import os
from functools import cache, wraps
from importlib import metadata
from typing import Any

NAME = "LMCacheKitConnector"
LMCACHE_NAME = "LMCacheConnectorV1"
LMCACHE_NAMES = (LMCACHE_NAME, "LMCacheConnectorV1Dynamic", "LMCacheMPConnector")
"""Names that LMCache's documents use. ``--kv-offloading-backend lmcache`` means the last one."""

TAKE_OVER = "LMCACHE_KIT_TAKE_OVER"
_MODULE = "lmcache_kit.vllm.connector"

_log = logging.getLogger("vllm.lmcache_kit")


def register() -> None:
    """Register the connector, and serve LMCache's names where LMCache itself is not installed."""
    try:
        _register()
    # An error here must not stop a vLLM that may not even use the connector.
    except Exception:  # noqa: BLE001
        _log.exception(
            "lmcache_kit could not register its connector with vLLM; vLLM goes on without it"
        )


def _register() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import (
        KVConnectorFactory,
    )

    known = KVConnectorFactory._registry
    names = [NAME]
    if NAME not in known:
        KVConnectorFactory.register_connector(NAME, _MODULE, NAME)
    if serves_lmcache_name():
        # vLLM's own classes of these names only wrap the lmcache package; there is no public way
        # to replace a registered name.
        for name in LMCACHE_NAMES:
            known.pop(name, None)
            KVConnectorFactory.register_connector(name, _MODULE, LMCACHE_NAME)
        _serve_lmcache_modules(KVConnectorFactory)
        names.extend(LMCACHE_NAMES)
    _check_configurations_of(names)


def _serve_lmcache_modules(factory: Any) -> None:
    """Serve LMCache's modules in ``kv_connector_module_path``, which cannot be imported here.

    vLLM imports the module before it looks at any registry.
    """
    find = factory.get_connector_class
    if hasattr(find, "__wrapped__"):
        return  # already done

    @wraps(find)
    def get_connector_class(kv_transfer_config: Any) -> Any:
        path, name = kv_transfer_config.kv_connector_module_path, kv_transfer_config.kv_connector
        if not path or path.partition(".")[0] != "lmcache" or not serves_lmcache_name():
            return find(kv_transfer_config)
        if name not in LMCACHE_NAMES:
            raise ValueError(
                f"kv_connector {name!r} of kv_connector_module_path {path!r} is LMCache's, which "
                f"is not installed: write kv_connector {NAME!r} and no kv_connector_module_path"
            )
        _log_once(f"kv_connector {name} of {path} is {NAME}")
        return factory.get_connector_class_by_name(name)

    factory.get_connector_class = staticmethod(get_connector_class)


@cache
def _log_once(message: str) -> None:
    _log.info("%s", message)


def _check_configurations_of(names: list[str]) -> None:
    """Let vLLM find mistakes in the kit's configuration before it loads a model."""
    from vllm.config import VllmConfig

    from lmcache_kit.vllm import start_check

    start_check.install(VllmConfig, names)


def serves_lmcache_name() -> bool:
    """Whether LMCache's names mean this connector.

    True where the distribution ``lmcache`` is not installed, or ``LMCACHE_KIT_TAKE_OVER=1``.
    """
    if os.environ.get(TAKE_OVER, "").strip("\"' ") == "1":
        return True
    try:
        metadata.distribution("lmcache")
    except metadata.PackageNotFoundError:
        return True
    return False
