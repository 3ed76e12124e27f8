"""Entry point of group ``vllm.general_plugins``: registers the connector with vLLM.

vLLM calls the entry point in each of its processes, and an exception in it would end every start of
vLLM on this machine, cached or not. Therefore :func:`register` never raises, and imports nothing
but what vLLM has imported already: its connector factory, and its configuration, which is told to
check the kit's own (:mod:`lmcache_kit.vllm.start_check`).
"""

from __future__ import annotations

import logging
import os
from importlib import metadata

NAME = "LMCacheKitConnector"
LMCACHE_NAME = "LMCacheConnectorV1"
TAKE_OVER = "LMCACHE_KIT_TAKE_OVER"
_MODULE = "lmcache_kit.vllm.connector"

_log = logging.getLogger("vllm.lmcache_kit")


def register() -> None:
    """Register the connector, and serve LMCache's name where LMCache itself is not installed."""
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
        # vLLM's own class of that name only wraps the lmcache package; there is no public way to
        # replace a registered name.
        known.pop(LMCACHE_NAME, None)
        KVConnectorFactory.register_connector(LMCACHE_NAME, _MODULE, LMCACHE_NAME)
        names.append(LMCACHE_NAME)
    _check_configurations_of(names)


def _check_configurations_of(names: list[str]) -> None:
    """Let vLLM find mistakes in the kit's configuration before it loads a model."""
    from vllm.config import VllmConfig

    from lmcache_kit.vllm import start_check

    start_check.install(VllmConfig, names)


def serves_lmcache_name() -> bool:
    """Whether ``LMCacheConnectorV1`` means this connector.

    True where the distribution ``lmcache`` is not installed, or ``LMCACHE_KIT_TAKE_OVER=1``.
    """
    if os.environ.get(TAKE_OVER, "") == "1":
        return True
    try:
        metadata.distribution("lmcache")
    except metadata.PackageNotFoundError:
        return True
    return False
