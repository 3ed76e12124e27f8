"""Commands on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import NamedTuple


class Shown(NamedTuple):
    """A command's exit code, its standard output, and all that the terminal showed."""

    returncode: int
    stdout: str
    screen: str


def on_a_terminal(*arguments: str, columns: int) -> Shown:
    """Run ``lmcache-kit`` with a terminal as its standard error."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", "from lmcache_kit.cli import main; main()", *arguments],
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = bytearray()
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # Linux reports the end of the other side as an error
        pass
    os.close(ours)
    stdout, _ = done.communicate(timeout=20)
    return Shown(done.returncode, stdout.decode(), shown.decode())
