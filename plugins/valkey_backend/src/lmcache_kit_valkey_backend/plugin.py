"""Plugin hooks: the backend ``ValkeyBackend``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import BackendSpec, ConfigKey


@hookimpl
def register_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="ValkeyBackend",
            target="lmcache_kit_valkey_backend.backend:ValkeyBackend",
            summary="KV cache on a Valkey or Redis server that several instances share",
            config="lmcache_kit_valkey_backend.options:ValkeyOptions",
            capabilities=frozenset({"shared"}),
            keys=(
                ConfigKey(
                    "remote_url",
                    option="url",
                    help="URL of a Valkey or Redis server for KV; adds this tier. "
                    "`redis://HOST:PORT`, `rediss://`, `valkey://`, `valkeys://` or `unix://`",
                    selects=True,
                ),
            ),
        )
    ]
