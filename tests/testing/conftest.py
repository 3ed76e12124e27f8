"""pytest in a process of its own, as an author runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent


@dataclass
class Ran:
    """``passed``, ``failed`` and ``skipped``: names of tests, by class; parameters left away in
    those that passed or were skipped only if all of them did. ``text``: what was printed."""

    code: int
    text: str
    passed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    failed: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    skipped: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


Run = Callable[..., Ran]

STUCK_S = 120
"""A test that takes so long hangs: pytest then writes where, and ends."""
TIMEOUT_S = 900


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    making = threading.Lock()

    def run(*files: Path, path: Path = HERE) -> Ran:
        with making:  # pytest makes such folders for one thread at a time
            folder = tmp_path_factory.mktemp("inner")
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
        report = folder / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-p", "lmcache_kit._pytest_plugin",
            "-p", "no:cacheprovider", "--noconftest", "-q", "--tb=short",
            "-o", f"faulthandler_timeout={STUCK_S}", "-o", "faulthandler_exit_on_timeout=true",
            "-c", str(folder / "pytest.ini"), f"--rootdir={folder}", f"--junitxml={report}",
            *map(str, files),
        ]  # fmt: skip
        # Nothing else that is installed may help or hinder. With CI set, pytest shows the whole of
        # what differs: suites that compare megabytes as they are would seem to hang.
        env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CI": "true"}
        env["PYTHONPATH"] = str(path)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            cwd=folder,
            env=env,
        )
        ran = Ran(done.returncode, done.stdout + done.stderr)
        if report.exists():
            _read(report, ran)
        return ran

    return run


def _read(report: Path, ran: Ran) -> None:
    for case in ElementTree.parse(report).iter("testcase"):
        if "name" not in case.attrib:  # what went wrong after the last test
            continue
        name = case.attrib["classname"].rpartition(".")[2]
        test = case.attrib["name"].partition("[")[0]
        bad = [each for each in case if each.tag in ("failure", "error")]
        if bad:
            ran.failed[name][test] = "\n".join(str(each.attrib.get("message")) for each in bad)
        elif case.find("skipped") is not None:
            ran.skipped[name].add(test)
        else:
            ran.passed[name].add(test)
