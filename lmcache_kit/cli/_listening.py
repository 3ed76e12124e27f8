"""Ports on the command line, and messages for those that cannot be had."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import click

from lmcache_kit.errors import KitError

_MONITOR_PORTS = ("pull", "reply", "heartbeat")


class ListenError(KitError):
    """This machine does not let us listen there."""


def monitor_ports(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...]:
    """Ports of ``{"pull": P, "reply": Q}``; LMCache's ``heartbeat`` is served as well."""
    if value is None:
        return ()
    try:
        ports = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None
    if not isinstance(ports, dict) or not ports:
        raise click.BadParameter("""write it as '{"pull": 8300, "reply": 8400}'""")
    for name, port in ports.items():
        if name not in _MONITOR_PORTS:
            raise click.BadParameter(f"unknown name {name!r}; known: {', '.join(_MONITOR_PORTS)}")
        if type(port) is not int or not 0 <= port <= 65535:
            raise click.BadParameter(f"{name}: {port!r} is no port")
    return tuple(ports.values())


def open_to_the_network(host: str) -> bool:
    """Whether others than this machine can reach what listens on ``host``."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


@contextmanager
def listening(frontend: str, host: str, port: int) -> Iterator[None]:
    """Turn an OSError of a frontend into ListenError: which address, and the flag to change it.

    The address is the error's ``filename`` where it has one.
    """
    try:
        yield
    except OSError as error:
        about_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        raise ListenError(
            f"cannot listen on {error.filename or f'{host}:{port}'} for {frontend}: "
            f"{error.strerror or error}",
            hint=f"Choose another {'address with --host' if about_host else 'port with --port'}",
        ) from None
