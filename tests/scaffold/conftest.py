"""Plugins made by ``lmcache-kit new-plugin``, and a folder where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcache_kit.cli.app import app
from lmcache_kit.scaffold import KINDS

WAIT_S = 240


def run(*command: str, cwd: Path, **environ: str) -> str:
    """What a program of this environment prints; fails with all that it said."""
    program, *arguments = command
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


@dataclass(frozen=True)
class Made:
    """One new plugin. ``said``: what the command printed."""

    kind: str
    folder: Path
    said: str

    @property
    def package(self) -> str:
        return self.folder.name.replace("-", "_")

    def files(self) -> set[str]:
        return {
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One of each kind."""
    into = tmp_path_factory.mktemp("made")
    found = {}
    for kind in KINDS:
        name = f"zz-{kind}"
        result = CliRunner().invoke(app, ["new-plugin", kind, name, "--into", str(into)])
        assert result.exit_code == 0, result.output
        found[kind] = Made(kind, into / name, result.output)
    return found


@pytest.fixture(scope="session")
def wheels(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("wheels")
    folders = [str(each.folder) for each in made.values()]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    run("python", "-m", "pip", "wheel", *options, *folders, cwd=out)
    return sorted(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path, with all of them in it."""
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(site)]
    run("python", "-m", "pip", "install", *options, *map(str, wheels), cwd=site)
    return site
