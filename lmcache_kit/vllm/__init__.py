"""The vLLM connector; the only package that imports vllm.

``kv_connector_module_path: "lmcache_kit.vllm"`` finds the connector here under both of its names.
Nothing heavy is imported before one of them is asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LMCacheConnectorV1", "LMCacheKitConnector"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmcache_kit.vllm import connector

    return getattr(connector, name)
