"""A third-party backend, made with what the kit publishes and nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import Make
from tests.packaging.distributions import CORE, EXAMPLE, ROOT, SOURCES
from tests.packaging.environments import Environment

FOLDER = SOURCES[EXAMPLE].folder
PACKAGE = SOURCES[EXAMPLE].package
PUBLISHED = {"hookspecs", "specs", "interfaces", "errors", "testing"}
MODULES = sorted([*FOLDER.glob("src/**/*.py"), *FOLDER.glob("tests/*.py")])
MAX_LINES = 120


def imported(path: Path) -> set[str]:
    """Modules that a file imports, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path.name} imports relatively"
            found.add(node.module)
    return found


def test_it_imports_of_the_kit_only_what_is_published() -> None:
    ours = {name for path in MODULES for name in imported(path) if name.startswith("lmcache_kit")}
    assert ours
    assert ours <= {f"lmcache_kit.{name}" for name in PUBLISHED}


def test_what_it_imports_is_public_there() -> None:
    """A package's ``__all__`` names it."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in {
                "lmcache_kit.interfaces",
                "lmcache_kit.testing",
            }:
                public = __import__(node.module, fromlist=["__all__"]).__all__
                assert {alias.name for alias in node.names} <= set(public)


def test_no_file_of_the_kit_knows_it() -> None:
    folders = [ROOT / CORE.replace("-", "_"), *ROOT.glob("plugins/*/src")]
    naming = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in {".py", ".tmpl"}
        if re.search(r"acme.sqlite|SQLiteBackend", path.read_text())
    }
    assert naming == set()


def test_a_backend_takes_less_than_120_lines() -> None:
    assert len((FOLDER / "src" / PACKAGE / "backend.py").read_text().splitlines()) < MAX_LINES


@pytest.fixture(scope="module")
def author(environment: Make) -> Environment:
    """A user who has the kit from its wheel."""
    return environment(CORE, EXAMPLE, extras=["testing"])


@pytest.mark.wheels
def test_it_passes_the_suites_that_the_kit_ships(author: Environment) -> None:
    tests = str(FOLDER / "tests")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(FOLDER / "pyproject.toml")]
    done = author.run("python", *command, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 70
    used = {
        alias.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "lmcache_kit.testing"
        for alias in node.names
    }
    assert {"BackendSuite", "PluginSuite"} <= used


@pytest.mark.wheels
def test_its_types_are_right_against_the_installed_kit(author: Environment, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}",
         "--python-executable", str(author.folder / "bin" / "python"), str(FOLDER / "src")],
        cwd=author.folder, env=author.environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found in 4 source files" in done.stdout


@pytest.mark.wheels
def test_a_wrong_type_would_be_seen(author: Environment, tmp_path: Path) -> None:
    """So the types of the kit are there."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from lmcache_kit.interfaces import StoreUsage\nStoreUsage('many', 1)\n")
    python = str(author.folder / "bin" / "python")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}",
         "--python-executable", python, str(wrong)],
        cwd=author.folder, env=author.environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'incompatible type "str"; expected "int"' in done.stdout
