"""Create the virtual environment in which the benchmarks run LMCache.

LMCache's wheel is installed on top of the kit's environment, which provides torch and vLLM.

Usage: setup_lmcache.py KIT_ENVIRONMENT LMCACHE_ENVIRONMENT
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = (
    "lmcache==0.5.6",
    "aiofile",
    "aiofiles",
    "caio",
    "nvtx",
    "opentelemetry-exporter-prometheus",
    "redis",
    "sortedcontainers",
)
"""LMCache, and those of its requirements that it imports at start."""


def main() -> None:
    base, target = (Path(argument).resolve() for argument in sys.argv[1:3])
    python = target / "bin" / "python"
    if not python.exists():
        venv.create(target, with_pip=True)
    tail = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    (target / tail / "base-environment.pth").write_text(f"{base / tail}\n")
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True
    )


if __name__ == "__main__":
    main()
