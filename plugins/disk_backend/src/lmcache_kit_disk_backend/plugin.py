"""Plugin hooks: the backend ``LocalDiskBackend``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import BackendSpec


@hookimpl
def register_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="LocalDiskBackend",
            target="lmcache_kit_disk_backend.backend:LocalDiskBackend",
            summary="KV cache in files on a local disk; survives restarts",
            config="lmcache_kit_disk_backend.options:DiskOptions",
        )
    ]
