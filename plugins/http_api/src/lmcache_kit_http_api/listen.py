"""Sockets to listen on."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

_NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}
_BACKLOG = 1024


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets; ``localhost`` is 127.0.0.1 and, where there is one, ::1, on one port.

    Raises OSError with the address in ``filename`` when one is taken or is not ours.
    """
    if host != "localhost":
        return [_listen(family, address) for family, address in _resolve(host, port)]
    first = _listen(socket.AF_INET, ("127.0.0.1", port))
    try:
        second = _listen(socket.AF_INET6, ("::1", first.getsockname()[1]))
    except OSError as error:
        # A port that the system chose may be taken on the other family; nobody counts on it there.
        if error.errno in _NO_SUCH_FAMILY or port == 0:
            return [first]
        first.close()
        raise
    return [first, second]


def url(listening: socket.socket, name: str = "") -> str:
    """``http://host:port`` of a socket; ``name`` stands for its address."""
    host, port = listening.getsockname()[:2]
    shown = name or (f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _resolve(host: str, port: int) -> Sequence[tuple[int, tuple[str, int]]]:
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    family, _, _, _, address = found[0]
    return [(family, (str(address[0]), int(address[1])))]


def _listen(family: int, address: tuple[str, int]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise OSError(error.errno, error.strerror, f"{address[0]}:{address[1]}") from None
    return made
