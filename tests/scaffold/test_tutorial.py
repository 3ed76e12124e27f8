"""docs/backend.md and docs/plugins.md, from top to bottom, as a reader would do it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = {
    page: re.findall(
        r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    for page in ("backend.md", "plugins.md")
}
LEFT = {"backend.md": {"acme-store"}, "plugins.md": {"acme-planes", "acme-wire", "acme-lines"}}
SHIPPED = {"backend.md": "acme-store", "plugins.md": "acme-planes"}
PROGRAMS = {
    "lmcache-kit": "from lmcache_kit.cli import main; main()",
    "pip": "from pip._internal.cli.main import main; raise SystemExit(main())",
    "pytest": "import pytest; raise SystemExit(pytest.main())",
}
WAIT_S = 240


@dataclass
class Reader:
    """A reader with an environment and one page.

    ``cwd``: the reader's folder. ``output``: of each command block.
    """

    page: str
    environment: Path
    cwd: Path
    output: list[str] = field(default_factory=list)

    def bash(self, commands: str) -> None:
        where = self.environment / "cwd"
        done = subprocess.run(
            ["bash", "-euxc", f"{commands}\npwd > {where}"],
            cwd=self.cwd,
            env=self._environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        self.output.append(done.stdout)
        self.cwd = Path(where.read_text().strip())

    def python(self, code: str) -> None:
        """Functions and classes go in the place of those of the same name, or to the end; what
        stands before them goes to the top."""
        file = self._named(code)
        lines = file.read_text().splitlines()
        old = _functions(file.read_text())
        for name, (start, end) in sorted(old.items(), key=lambda each: -each[1][0]):
            if name in _functions(code):
                lines[start:end] = _cut(code, name)
        new = [line for name in _functions(code) if name not in old for line in _cut(code, name)]
        at = lines.index("from __future__ import annotations") + 1
        imports = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
        constants = [line for line in code.splitlines() if re.match(r"[A-Z]+ = ", line)]
        last = max(at for at, line in enumerate(lines) if line.startswith(("import ", "from "))) + 1
        file.write_text(
            "\n".join(
                [
                    *lines[:at],
                    *imports,
                    *lines[at:last],
                    *constants,
                    *lines[last:],
                    "",
                    "",
                    *new,
                    "",
                ]
            )
        )

    def yaml(self, text: str) -> None:
        self._named(text).write_text(text)

    def _named(self, block: str) -> Path:
        """The file that its first line names."""
        return self.cwd / block.splitlines()[0].removeprefix("# ")

    def _environ(self) -> dict[str, str]:
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        return kept | {
            "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}",
            # No network: what building needs is here.
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def _functions(code: str) -> dict[str, tuple[int, int]]:
    """Where each function and class of a module stands, in lines from 0."""
    return {
        node.name: (node.lineno - 1, node.end_lineno or node.lineno)
        for node in ast.parse(code).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def _cut(code: str, name: str) -> list[str]:
    start, end = _functions(code)[name]
    return code.splitlines()[start:end]


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def reader(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Reader:
    """An environment that has what ours has, and keeps to itself what is installed in it."""
    folder = tmp_path_factory.mktemp("reader")
    environment = folder / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    [site] = environment.glob("lib/python3*/site-packages")
    ours = sysconfig.get_path("purelib")
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    for name, code in PROGRAMS.items():
        program = environment / "bin" / name
        program.write_text(f"#!{environment / 'bin' / 'python'}\n{code}\n")
        program.chmod(0o755)
    (folder / "work").mkdir()
    return Reader(request.param, environment, folder / "work")


@pytest.fixture(scope="module")
def read(reader: Reader) -> Reader:
    """He has done it all."""
    kinds: dict[str, Callable[[str], None]] = {
        "bash": reader.bash,
        "python": reader.python,
        "yaml": reader.yaml,
    }
    for kind, block in BLOCKS[reader.page]:
        kinds[kind](block)
    return reader


@pytest.mark.wheels
def test_every_block_of_the_page_works(read: Reader) -> None:
    assert len(read.output) == sum(kind == "bash" for kind, _ in BLOCKS[read.page])
    assert {each.name for each in read.cwd.iterdir()} == LEFT[read.page]


@pytest.mark.wheels
def test_tests_pass_before_and_after_and_more_were_added(read: Reader) -> None:
    green = [each for each in read.output if "failed" not in each]
    passed = [int(count) for each in green for count in re.findall(r"(\d+) passed", each)]
    assert len(passed) == 3
    assert passed[0] < passed[1] == passed[2]


@pytest.mark.wheels
def test_what_is_broken_on_the_way_is_seen(read: Reader) -> None:
    broken = [each for each in read.output if re.search(r"\d+ failed", each)]
    assert len(broken) == (read.page == "backend.md")
    assert all("the suite has seen it" in each for each in broken)


@pytest.mark.wheels
def test_the_plugin_is_listed_before_and_after_it_is_shipped(read: Reader) -> None:
    rows = [
        line
        for each in read.output
        for line in each.splitlines()
        if line.startswith(f"{SHIPPED[read.page]} ") and line.rstrip().endswith("ready")
    ]
    assert len(rows) == 2
    assert f"/{SHIPPED[read.page]}/src/" in rows[0]
    assert "/site-packages/" in rows[1]


@pytest.mark.wheels
def test_the_marks_are_found(read: Reader) -> None:
    [found] = [each for each in read.output if "grep" in each]
    assert re.search(r"src/acme_\w+/(backend|codec)\.py:", found)


def test_every_kind_has_its_part_of_the_page() -> None:
    from lmcache_kit.scaffold import KINDS

    blocks = [each for page in BLOCKS.values() for each in page]
    commands = "\n".join(block for kind, block in blocks if kind == "bash")
    assert set(re.findall(r"new-plugin (\w+)", commands)) == set(KINDS)


def test_this_python_is_the_one_of_the_environment() -> None:
    assert Path(sysconfig.get_path("purelib")).is_relative_to(sys.prefix)
