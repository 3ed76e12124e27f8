"""Run the programs of this folder with the interpreter that has LMCache; read their results."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INTERPRETER = HERE.parents[1] / ".venv-lmcache" / "bin" / "python"
_QUIET = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOG_LEVEL": "ERROR",
    "LMCACHE_DISABLE_BANNER": "1",
    "PYTHONHASHSEED": "0",
}


def measure(name: str, *arguments: object) -> dict[str, Any] | None:
    """Run ``<name>.py`` of this folder and return the figures that it prints.

    Without LMCache, print a line that says so and return None.
    """
    if not INTERPRETER.exists():
        print("LMCache is not measured: run `make lmcache` first")
        return None
    done = subprocess.run(
        [str(INTERPRETER), str(HERE / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, **_QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"benchmarks/lmcache_baseline/{name}.py failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures
