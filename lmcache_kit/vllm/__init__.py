"""The vLLM connector. Runs in vLLM's processes; the only package that imports vllm.

1. Serving goes on whatever happens to the cache. Only a wrong configuration ends a start.
2. One class serves both of vLLM's roles: :mod:`.scheduler` plans, :mod:`.worker` copies. The roles
   meet only in the metadata of each step (:mod:`.metadata`).
3. The reader verifies: a load hashes each payload after it was copied. A mismatch is a failed load,
   and vLLM computes those tokens again.
4. Nothing is saved that was computed from a failed load.
5. The engine's page order is detected or indexed, never assumed (:mod:`.cpu_pages`,
   :mod:`.cuda_pages`); payloads are the same on every device.

``kv_connector_module_path: "lmcache_kit.vllm"`` finds the connector here under all of its names.
Nothing heavy is imported before one of them is asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LMCacheConnectorV1", "LMCacheKitConnector"]


def __getattr__(name: str) -> Any:
    from lmcache_kit.vllm.plugin import LMCACHE_NAME, LMCACHE_NAMES

    wanted = LMCACHE_NAME if name in LMCACHE_NAMES else name
    if wanted not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmcache_kit.vllm import connector

    return getattr(connector, wanted)
