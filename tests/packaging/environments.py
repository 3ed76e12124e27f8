"""Clean environments: what is installed there, and what that says it requires, and nothing else."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.distributions import SOURCES, Built

WAIT_S = 300


@dataclass(frozen=True)
class Environment:
    """A virtual environment, away from the sources."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=False, symlinks=True)
        folder.chmod(0o700)  # a cache process may listen there
        return cls(folder)

    @property
    def site(self) -> Path:
        [found] = self.folder.glob("lib/python3*/site-packages")
        return found

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environ() | environ,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    @contextmanager
    def running(self, *command: str, until: str) -> Iterator[re.Match[str]]:
        """What its first line says of ``until``, while it runs. Fails if it does not end well."""
        with subprocess.Popen(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environ() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout
                ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
                line = process.stdout.readline() if ready else ""
                found = re.search(until, line)
                assert found, (line, process.poll())
                yield found
                process.terminate()
                assert process.wait(WAIT_S) == 0
            finally:
                process.kill()

    def python(self, code: str, *arguments: str) -> str:
        done = self.run("python", "-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def plugins(self, **environ: str) -> list[dict[str, str]]:
        done = self.run("lmcache-kit", "plugins", "--json", **environ)
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, str]] = json.loads(done.stdout)
        return rows

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Ours, at work in there."""
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        python = str(self.folder / "bin" / "python")
        return subprocess.run(
            [*pip, "--python", python, *arguments],
            cwd=self.folder,
            env=self.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def install(self, *built: Built, extras: Iterable[str] = (), without: str = "") -> None:
        """Install wheels. What they require, with the ``extras`` that one of them has but not
        ``without``, is here already and linked from here: downloading it would show nothing."""
        requirements = [Requirement(line) for each in built for line in each.requires()]
        for distribution in _required(requirements, extras):
            if canonicalize_name(distribution.name) != without:
                self._link(distribution)
        wheels = [str(each.wheel) for each in built]
        done = self.pip("install", "--no-deps", "--no-index", "--no-compile", *wheels)
        assert done.returncode == 0, done.stdout

    def uninstall(self, *names: str) -> None:
        done = self.pip("uninstall", "--yes", *names)
        assert done.returncode == 0, done.stdout

    def environ(self) -> dict[str, str]:
        """Ours, less what would let it see our packages."""
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "XDG_RUNTIME_DIR")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        return kept | {"PYTHONDONTWRITEBYTECODE": "1"}

    def _link(self, distribution: metadata.Distribution) -> None:
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            link = self.site / top
            if not link.is_symlink():
                link.symlink_to(Path(str(distribution.locate_file(top))))


def _required(
    requirements: Iterable[Requirement], extras: Iterable[str]
) -> Iterable[metadata.Distribution]:
    """What these ask for, and what that asks for, but for what is built here."""
    todo = [(each, extra) for each in requirements for extra in ("", *extras)]
    found: dict[tuple[str, str], metadata.Distribution] = {}
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in SOURCES:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found[name, wanted] = metadata.distribution(name)
                needs = found[name, wanted].requires or []
                todo += [(each, wanted) for each in map(Requirement, needs)]
    return found.values()
