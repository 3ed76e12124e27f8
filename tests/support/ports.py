"""TCP ports of this host."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

HOST = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Return different ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in held]


def free_port() -> int:
    """Return a port that was free a moment ago."""
    [port] = free_ports(1)
    return port


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """Hold a port on which a socket listens and accepts nothing."""
    with socket.create_server((HOST, 0)) as taken:
        yield taken.getsockname()[1]
