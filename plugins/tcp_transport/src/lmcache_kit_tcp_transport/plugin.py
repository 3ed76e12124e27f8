"""Plugin hooks: the transport ``tcp``."""

from __future__ import annotations

from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.specs import TransportSpec


@hookimpl
def register_transports() -> list[TransportSpec]:
    return [
        TransportSpec(
            name="tcp",
            target="lmcache_kit_tcp_transport.transport:TcpTransport",
            summary="KV over one plain or TLS connection a peer, on any network",
            capabilities=frozenset({"any-network"}),
        )
    ]
