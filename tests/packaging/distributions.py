"""What this repository distributes, and how it is built."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CORE = "lmcache-kit"
EXAMPLE = "acme-sqlite"

_BUILD = """
import os, sys
from hatchling import build
into, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    print(build.build_sdist(into) if into.endswith("sdists") else build.build_wheel(into))
"""
"""What pip does to build, for all of them in one process."""


@dataclass(frozen=True)
class Source:
    """A distribution in the tree. ``folder`` has its pyproject.toml."""

    folder: Path

    @cached_property
    def project(self) -> dict[str, Any]:
        text = (self.folder / "pyproject.toml").read_text()
        found: dict[str, Any] = tomllib.loads(text)["project"]
        return found

    @property
    def name(self) -> str:
        return str(self.project["name"])

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    @property
    def packages_in(self) -> str:
        """Where the package lies, from ``folder``; ends in a slash if it is not empty."""
        return "" if (self.folder / self.package).is_dir() else "src/"

    def files(self) -> set[str]:
        """Of the package, from where it lies."""
        root = self.folder / self.packages_in
        return {
            str(path.relative_to(root))
            for path in (root / self.package).rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"
        }


SOURCES = {
    source.name: source
    for source in map(
        Source,
        [
            ROOT,
            *(path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))),
            ROOT / "examples" / "third_party_backend",
        ],
    )
}
"""All of them by name: the core, our plugins, and the third-party example."""

PLUGINS = [name for name in SOURCES if name != CORE]
OURS = [name for name in SOURCES if name != EXAMPLE]


@dataclass(frozen=True)
class Built:
    """``rebuilt``: the wheel that was built from the sdist."""

    wheel: Path
    sdist: Path
    rebuilt: Path

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as wheel:
            [name] = [each for each in wheel.namelist() if each.endswith(".dist-info/METADATA")]
            return BytesParser().parse(BytesIO(wheel.read(name)))

    def requires(self) -> list[str]:
        return list(self.metadata().get_all("Requires-Dist", []))


def build(into: Path) -> dict[str, Built]:
    """Wheels and sdists of all, by name."""
    folders = [source.folder for source in SOURCES.values()]
    sdists = _build(into / "sdists", folders)
    unpacked = [_unpacked(sdist, into / "unpacked") for sdist in sdists]
    wheels, rebuilt = _build(into / "wheels", folders), _build(into / "rebuilt", unpacked)
    parts = zip(SOURCES, wheels, sdists, rebuilt, strict=True)
    return {name: Built(*paths) for name, *paths in parts}


def _build(into: Path, folders: list[Path]) -> list[Path]:
    into.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(into), *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [into / line for line in done.stdout.splitlines()]


def _unpacked(sdist: Path, into: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    return into / sdist.name.removesuffix(".tar.gz")
