"""``python -m lmcache_kit.service``: the spawned cache process.

Reads its configuration as JSON on stdin, and reports on ``--status-fd`` in one line of JSON that
it is ready, or why it cannot be. :mod:`~lmcache_kit.service.launch` starts it; users start
``lmcache-kit cache-server``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TextIO


def main() -> int:
    """Detach from the starting process, then serve. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m lmcache_kit.service")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    options = parser.parse_args()
    # vLLM kills all its descendants when it ends, and this process outlives it: be adopted by init.
    if os.fork():
        os._exit(0)
    os.set_inheritable(options.status_fd, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return _serve(options.socket, options.status_fd)


def _serve(socket: Path, status_fd: int) -> int:
    import logging  # imports wait until the launcher has gone

    from lmcache_kit.config import KitConfig
    from lmcache_kit.errors import KitError
    from lmcache_kit.process.log_relay import FORMAT
    from lmcache_kit.service.service import serve

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=FORMAT)
    status = os.fdopen(status_fd, "w")
    try:
        config = KitConfig.from_json(sys.stdin.buffer.read())
        serve(
            config,
            socket=socket,
            linger_s=config.cache_linger_s,
            on_ready=lambda: _report(status),
        )
    except (KitError, OSError) as error:
        # Not as an error: the starter gets the report, and logs it.
        logging.getLogger(__name__).info("cannot serve: %s", error)
        _report(status, type(error).__name__, *_parts(error))
        return 1
    return 0


def _parts(error: Exception) -> tuple[str, str]:
    return getattr(error, "message", str(error)), getattr(error, "hint", "")


def _report(status: TextIO, error: str = "", message: str = "", hint: str = "") -> None:
    """Write the report once. The starter may have ended already; another client may come."""
    if not status.closed:
        with contextlib.suppress(BrokenPipeError), status:
            status.write(json.dumps({"error": error, "message": message, "hint": hint}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
