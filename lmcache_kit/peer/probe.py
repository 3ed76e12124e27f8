"""Probe whether a transport works on this machine.

Two instances of the transport connect to each other, in a process of their own, because a library
of a transport may abort the process that calls it.

``python -m lmcache_kit.peer.probe NAME`` reads a configuration as JSON on stdin and prints a
:class:`ProbeResult` as JSON.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import msgspec

from lmcache_kit.errors import KitError
from lmcache_kit.interfaces import Transport

if TYPE_CHECKING:
    from lmcache_kit.config import KitConfig

PROBE_S = 30.0
_MEMORY_BYTES = 1 << 20


class ProbeResult(msgspec.Struct, frozen=True):
    """``description`` of the link between two processes of this host, or why it is ``unusable``."""

    description: str = ""
    unusable: str = ""


def probe(name: str, config: KitConfig) -> ProbeResult:
    """Probe a transport as this configuration would use it. Takes about a second."""
    command = [sys.executable, "-P", "-m", "lmcache_kit.peer.probe", name]
    try:
        done = subprocess.run(
            command,
            input=config.to_json().encode(),
            capture_output=True,
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(unusable=f"it did not answer within {PROBE_S:g} s")
    try:
        return msgspec.json.decode(
            done.stdout.rpartition(b"\n")[2] or done.stdout, type=ProbeResult
        )
    except msgspec.MsgspecError:
        return ProbeResult(
            unusable=f"it ended the process that probed it (exit code {done.returncode})"
        )


def probe_here(name: str, config: KitConfig) -> ProbeResult:
    """Probe a transport in this process."""
    from lmcache_kit.peer.transports import make, options_of
    from lmcache_kit.plugins import Plugins

    plugins = Plugins.load()
    with contextlib.ExitStack() as ending:
        pair: list[Transport] = []
        for _ in range(2):
            memory = memoryview(bytearray(_MEMORY_BYTES))
            made = make(plugins, name, memory, config.p2p_host, options_of(config).get(name))
            if isinstance(made, str):
                return ProbeResult(unusable=made)
            ending.callback(made.close)
            pair.append(made)
        source, destination = pair

        def dial(timeout_s: float) -> socket.socket:
            ours, theirs = socket.socketpair()
            threading.Thread(target=source.serve, args=(theirs,), daemon=True).start()
            return ours

        try:
            link = destination.connect(source.address(), dial, PROBE_S / 2)
        except KitError as error:
            return ProbeResult(unusable=str(error))
        ending.callback(link.close)
        return ProbeResult(description=link.description)


def main() -> None:
    """Probe the transport named by the first argument; see the module."""
    from lmcache_kit.config import KitConfig

    config = KitConfig.from_json(sys.stdin.buffer.read())
    answer = msgspec.json.encode(probe_here(sys.argv[1], config))
    sys.stdout.buffer.write(b"\n" + answer)


if __name__ == "__main__":
    main()
