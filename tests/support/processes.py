"""Programs of this environment, and what Linux says about a process."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.waiting import DEADLINE_S, eventually


def program(name: str) -> str:
    """Return the path of a program that is installed beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def run(
    *command: str,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = DEADLINE_S,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and capture its output; the exit code is not checked.

    ``environ`` is added to the environment of this process.
    """
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_python(code: str, *arguments: str) -> str:
    """Run Python code, dedented, in a fresh interpreter; require success and return its output."""
    done = run(sys.executable, "-c", textwrap.dedent(code), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def freeze(pid: int) -> None:
    """Send SIGSTOP and wait until every thread has stopped: one may still answer until then."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    eventually(lambda: {state(int(each.name)) for each in threads.iterdir()} == {"T"})


class Program:
    """A running program that has printed its first line, ``ready``.

    ``prefix`` comes before the command, e.g. ``ip netns exec NAME``. Standard error goes to ``log``
    or, without one, to a temporary file: :meth:`errors` reads it.
    """

    def __init__(
        self,
        *command: str,
        log: Path | None = None,
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._log = log.open("ab+") if log else tempfile.TemporaryFile("ab+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*prefix, *command],
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.ready = self._first_line()
        if not self.ready:
            errors = self.errors()
            self.end()
            raise AssertionError(f"{' '.join(command)} printed nothing:\n{errors}")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP has taken effect."""
        return state(self.pid) == "T"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def errors(self) -> str:
        """Return what the program wrote to standard error so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def exit_code(self, number: signal.Signals) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        self.send(number)
        return self.process.wait(DEADLINE_S)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, wait for the end, and close all files; may be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        self.process.wait(DEADLINE_S)
        if self.process.stdout:
            self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.end()

    def _first_line(self) -> str:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        return self.process.stdout.readline() if ready else ""


def state(pid: int) -> str:
    """Return the state letter that Linux shows, R, S, D, T or Z; empty without such a process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[0]


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    return state(pid) not in ("", "Z")


def descendants(pid: int) -> list[int]:
    """Return the process ids of all children, parents before their children."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def open_files() -> int:
    """Return the number of file descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a private folder with a short path, because paths of Unix sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="lk-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
