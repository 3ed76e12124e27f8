"""Create a virtual environment, and run pip and Python in it.

Runs with the standard library alone, before anything is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_VERSIONS = (
    "import importlib.metadata as m, json;"
    "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
)
_REQUIRES = "import importlib.metadata as m, json, sys; print(json.dumps(m.requires(sys.argv[1])))"


class SetupError(Exception):
    """A step failed. The message says what to do."""


class CommandFailed(SetupError):
    """A command failed. ``output`` is what the command printed."""

    def __init__(self, command: list[str], output: str) -> None:
        super().__init__(f"{' '.join(command)}\nfailed:\n{output}")
        self.output = output


@dataclass(frozen=True)
class Environment:
    """A virtual environment in ``folder``."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def create(self) -> None:
        """Create the environment with the running interpreter."""
        try:
            venv.create(self.folder, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as error:
            hint = "The system's packages python3-venv and python3-pip may be missing."
            raise SetupError(f"cannot create {self.folder}: {error}\n{hint}") from error

    def pip(self, *arguments: str) -> None:
        """Run pip quietly. Raises CommandFailed with the output of pip."""
        self.run("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def run(self, *arguments: str) -> None:
        """Run the interpreter in the repository's root, without output."""
        command = [str(self.python), *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CommandFailed(command, done.stdout)

    def installed(self) -> dict[str, str]:
        """Return the versions of all installed distributions by normalised name."""
        versions: dict[str, str] = self._ask(_VERSIONS)
        return versions

    def requires(self, distribution: str, *, without: tuple[str, ...]) -> list[str]:
        """Return the requirements of a distribution, without those of extras and in ``without``."""
        lines: list[str] = self._ask(_REQUIRES, distribution) or []
        return [line for line in lines if "extra ==" not in line and _name(line) not in without]

    def _ask(self, code: str, *arguments: str) -> Any:
        command = [str(self.python), "-c", code, *arguments]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def say(step: str) -> None:
    """Print a step with the time of day."""
    print(f"setup ({time.strftime('%H:%M:%S')}): {step}", flush=True)


def _name(requirement: str) -> str:
    """Return the normalised name in a requirement."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""
