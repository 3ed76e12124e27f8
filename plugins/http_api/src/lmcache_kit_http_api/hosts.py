"""The ``Host`` header: which names of this server a request may use.

A web page can point its own name at this machine (DNS rebinding), and a browser then sends the
page's requests here as if both were one site. Such a request still carries the page's name in
``Host``. An address proves that no name was involved, so any IP address is accepted.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from functools import lru_cache

ANY = "*"
_KNOWN_HEADERS = 256


class HostCheck:
    """Whether a ``Host`` header names this server.

    ``names``: what it is called beside ``localhost`` and the host's own name; ``*`` is any name,
    ``*.example`` any name below ``example``.
    """

    def __init__(self, names: Iterable[str]) -> None:
        own = socket.gethostname()
        given = {normalized(name) for name in ("localhost", own, own.partition(".")[0], *names)}
        self._any = ANY in given
        self._names = frozenset(given)
        self._parents = tuple(name[1:] for name in given if name.startswith("*."))
        # Clients send the same few headers again and again.
        self.accepts = lru_cache(_KNOWN_HEADERS)(self._accepts)

    @property
    def names(self) -> list[str]:
        """The names, for messages."""
        return sorted(self._names)

    def _accepts(self, header: str) -> bool:
        name = normalized(without_port(header))
        if self._any or name in self._names or name.endswith(self._parents):
            return True
        return name.endswith(".localhost") or _is_address(name)


def normalized(name: str) -> str:
    """Return a host name without case and the dot of the root."""
    return name.strip().lower().removesuffix(".")


def without_port(header: str) -> str:
    """Return the host of ``host``, ``host:port``, ``[address]`` or ``[address]:port``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    name, colon, port = header.rpartition(":")
    return name if colon and (port.isdigit() or not port) else header


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
