"""Plugin hooks: the backend ``LocalCPUBackend``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import BackendSpec


@hookimpl
def register_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="LocalCPUBackend",
            target="lmcache_kit_cpu_backend.backend:LocalCPUBackend",
            summary="KV cache in host memory that workers map and write in place",
            capabilities=frozenset({"memory"}),
            probe="lmcache_kit_cpu_backend.memory_limits:probe",
        )
    ]
