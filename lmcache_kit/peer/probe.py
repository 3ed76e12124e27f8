"""Whether a transport works on this machine: two of it, in a process of their own, that reach each
other. A transport's library may end the process that it is tried in.

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

TRIAL_S = 30.0
_MEMORY_BYTES = 1 << 20


class ProbeResult(msgspec.Struct, frozen=True):
    """``how`` two processes on this host would reach each other, or ``why_not``."""

    how: str = ""
    why_not: str = ""


def probe(name: str, config: KitConfig) -> ProbeResult:
    """Try a transport as this configuration would use it. Takes a second or so."""
    command = [sys.executable, "-P", "-m", "lmcache_kit.peer.probe", name]
    try:
        done = subprocess.run(
            command,
            input=config.to_json().encode(),
            capture_output=True,
            timeout=TRIAL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(why_not=f"it did not answer within {TRIAL_S:g} s")
    try:
        return msgspec.json.decode(
            done.stdout.rpartition(b"\n")[2] or done.stdout, type=ProbeResult
        )
    except msgspec.MsgspecError:
        return ProbeResult(
            why_not=f"it ended the process that tried it (exit code {done.returncode})"
        )


def probe_here(name: str, config: KitConfig) -> ProbeResult:
    """The same in this process."""
    from lmcache_kit.peer.transports import make
    from lmcache_kit.plugins import Plugins

    plugins = Plugins.load()
    with contextlib.ExitStack() as ending:
        pair: list[Transport] = []
        for _ in range(2):
            memory = memoryview(bytearray(_MEMORY_BYTES))
            made = make(plugins, name, memory, config.p2p_host, config.transport_options.get(name))
            if isinstance(made, str):
                return ProbeResult(why_not=made)
            ending.callback(made.close)
            pair.append(made)
        source, goal = pair

        def dial(timeout_s: float) -> socket.socket:
            ours, theirs = socket.socketpair()
            threading.Thread(target=source.serve, args=(theirs,), daemon=True).start()
            return ours

        try:
            link = goal.connect(source.address(), dial, TRIAL_S / 2)
        except KitError as error:
            return ProbeResult(why_not=str(error))
        ending.callback(link.close)
        return ProbeResult(how=link.how)


def main() -> None:
    """See the module."""
    from lmcache_kit.config import KitConfig

    config = KitConfig.from_json(sys.stdin.buffer.read())
    answer = msgspec.json.encode(probe_here(sys.argv[1], config))
    sys.stdout.buffer.write(b"\n" + answer)


if __name__ == "__main__":
    main()
