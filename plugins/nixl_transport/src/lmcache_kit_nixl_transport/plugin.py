"""Plugin hooks: the transport ``nixl``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import ConfigKey, TransportSpec


@hookimpl
def register_transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            name="nixl",
            target="lmcache_kit_nixl_transport.transport:NixlTransport",
            summary="KV by NIXL: RDMA between hosts, CMA on one host",
            config="lmcache_kit_nixl_transport.options:NixlOptions",
            capabilities=frozenset({"one-sided"}),
            keys=(
                ConfigKey(
                    "nixl_backends",
                    option="backends",
                    help="Backends of NIXL by name; UCX if absent",
                    type="list",
                ),
            ),
            probe="lmcache_kit_nixl_transport.probe:why_not",
        )
    ]
