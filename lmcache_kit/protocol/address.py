"""Convert addresses from the form of configurations to that of ZMQ."""

from __future__ import annotations

import socket

from lmcache_kit.errors import ConfigError


def numeric_host(host: str) -> str:
    """Resolve a host name to the address to bind; ``localhost`` is 127.0.0.1.

    Raises ConfigError for a name that has no address.
    """
    if host in ("", "*"):
        return "0.0.0.0"  # noqa: S104 - asked for by name
    if host == "localhost":
        return "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host {host!r} has no address ({error})", hint="Choose another with --host"
        ) from None
    found.sort(key=lambda item: item[0] != socket.AF_INET)
    return str(found[0][4][0])


def bind_url(host: str, port: int) -> str:
    """Return ``tcp://address:port``, with brackets around an IPv6 address."""
    address = numeric_host(host)
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def connect_url(url: str) -> str:
    """Return ``tcp://localhost:9001`` for ``localhost:9001`` or ``tcp://localhost:9001``.

    Raises ConfigError when there is no port.
    """
    scheme, found, rest = url.strip().rpartition("://")
    host, _, port = rest.rpartition(":")
    if (found and scheme != "tcp") or not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"controller_url {url!r} is not an address", hint="Write it as host:port")
    # Zero binds to any address and connects to this host; ZMQ does only the first.
    return f"tcp://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104
