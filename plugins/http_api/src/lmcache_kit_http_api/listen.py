"""Sockets to listen on."""

from __future__ import annotations

import errno
import os
import socket

_NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Open listening sockets. ``localhost`` is 127.0.0.1 and, where there is one, ::1, on one port.

    Raises OSError with the address in ``filename`` when it is taken or not of this machine.
    """
    if host != "localhost":
        return [_listen(host, port)]
    first = _listen("127.0.0.1", port)
    try:
        second = _listen("::1", first.getsockname()[1])
    except OSError as error:
        # A port that the system chose may be taken on the other family, where it was not promised.
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


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    try:
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        number = error.errno or errno.EADDRNOTAVAIL
        raise OSError(number, os.strerror(number), f"{address[0]}:{port}") from None
