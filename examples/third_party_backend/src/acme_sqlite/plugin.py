"""Plugin hooks. Every process of the kit imports this module, so it imports nothing heavy."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import BackendSpec


@hookimpl
def register_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="SQLiteBackend",
            target="acme_sqlite.backend:SQLiteBackend",
            summary="KV cache in one SQLite file; survives restarts",
            config="acme_sqlite.options:SQLiteOptions",
        )
    ]
