"""Run the tests that need no vLLM on every Python version that the project supports.

The versions are those of the classifiers in ``pyproject.toml``. Each has a virtual environment of
its own, ``.venv-<version>``, without vLLM and torch. A version without an interpreter on this
machine is reported; with ``--all`` it is an error.

Usage: python -m tools.pythons [--all] [VERSION ...] [-- PYTEST_ARGUMENT ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.environment import ROOT

SELECTED = "not vllm and not gpu and not wheels"
PLACES = (
    "~/.pyenv/versions/{version}*/bin/python{version}",
    "~/.local/share/uv/python/cpython-{version}*/bin/python{version}",
)
"""Interpreters of pyenv and uv, which may not be on the path."""


def supported() -> list[str]:
    """Return the Python versions that ``pyproject.toml`` names, such as "3.11"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [each.rpartition(" :: ")[2] for each in project["classifiers"]]
    return [name for name in names if name.startswith("3.")]


def find(version: str, home: Path | None = None) -> Path | None:
    """Return an interpreter of this version that runs and can create environments, or None."""
    return next(filter(_works(version), _candidates(version, home or Path.home())), None)


def _candidates(version: str, home: Path) -> Iterable[Path]:
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        yield Path(sys.executable)
    if on_path := shutil.which(f"python{version}"):
        yield Path(on_path)
    for place in PLACES:
        yield from sorted(home.glob(place.removeprefix("~/").format(version=version)), reverse=True)


def _works(version: str) -> Callable[[Path], bool]:
    """Return a check that an interpreter runs: a shim of pyenv may be for a version not enabled."""
    code = f"import ensurepip, sys; sys.exit('{version}' != '%d.%d' % sys.version_info[:2])"

    def works(python: Path) -> bool:
        done = subprocess.run([str(python), "-c", code], capture_output=True, check=False)
        return done.returncode == 0

    return works


def run(version: str, python: Path, arguments: list[str]) -> bool:
    """Update the environment and run the tests in it; return whether both succeeded."""
    folder = f".venv-{version}"
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    tests = ["-m", "pytest", "-n", "2", "--no-loadscope-reorder", "-m", SELECTED, *arguments]
    for command in (
        [str(python), "-m", "tools.setup_env", folder, "--without-vllm"],
        [str(ROOT / folder / "bin" / "python"), *tests],
    ):
        if subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode:
            return False
    return True


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="default: all supported")
    parser.add_argument("--all", action="store_true", help="fail where an interpreter is missing")
    options = parser.parse_args(given[:cut])
    print(f"Without vLLM, only these tests run: {SELECTED}", flush=True)
    results = {}
    for version in options.versions or supported():
        python = find(version)
        if python is None:
            results[version] = "MISSING: no interpreter on the path, in pyenv or in uv"
            continue
        print(f"Python {version}: {python}", flush=True)
        results[version] = "passed" if run(version, python, given[cut + 1 :]) else "FAILED"
    for version, result in results.items():
        print(f"Python {version}: {result}")
    bad = ("FAILED", "MISSING") if options.all else ("FAILED",)
    failed = any(result.startswith(bad) for result in results.values())
    return 1 if failed or "passed" not in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())
