"""Create the environment in which the benchmarks run LMCache: its wheel on top of the kit's own
environment, which lends it torch and vLLM.

Usage: setup_peer.py BASE_ENVIRONMENT PEER_ENVIRONMENT
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
"""What LMCache imports at start, of the much longer list that it requires."""


def main() -> None:
    base, peer = (Path(argument).resolve() for argument in sys.argv[1:3])
    python = peer / "bin" / "python"
    if not python.exists():
        venv.create(peer, with_pip=True)
    tail = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    (peer / tail / "base-environment.pth").write_text(f"{base / tail}\n")
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True
    )


if __name__ == "__main__":
    main()
