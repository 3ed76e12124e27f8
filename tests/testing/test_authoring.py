"""What an author forgets or leaves out is said, loudly, and with the remedy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_kit import testing

if TYPE_CHECKING:
    from tests.testing.conftest import Ran, Run

ROOT = Path(__file__).parents[2]
SUITES = sorted(name for name in testing.__all__ if name.endswith("Suite"))
HEAD = """
import pytest
from lmcache_kit.testing import *
from faulty_codecs import Right as Codec
"""
MINE = """
class TestMine(CodecSuite):
    @pytest.fixture
    def codec(self):
        return Codec()
"""


@pytest.fixture
def author(run: Run, tmp_path: Path):
    def write(code: str) -> Ran:
        file = tmp_path / "test_mine.py"
        file.write_text(HEAD + code)
        return run(file)

    return write


def test_a_suite_that_is_given_what_it_needs_runs(author) -> None:
    ran = author(MINE)
    assert ran.code == 0, ran.text
    assert len(ran.passed["TestMine"]) > 20
    assert ran.skipped["TestMine"] == {"test_another_version_is_refused_by_name"}


def test_a_suite_itself_is_not_collected(author) -> None:
    assert author("def test_nothing(): pass\n").text.startswith(".")


def test_what_is_missing_is_named_and_shown(author) -> None:
    """All of them in one run; none of them is silently not collected."""
    ran = author("".join(f"class My{name}({name}): pass\n" for name in SUITES))
    assert ran.code == 1
    for name in SUITES:
        told = " ".join(ran.failed[f"My{name}"].values())
        assert re.search(rf"My{name} does not define the (fixture|attribute) '\w+'", told)
        assert f"class My{name}({name}):" in told
        assert not ran.passed[f"My{name}"]
    assert "def make_memory(self)" in " ".join(ran.failed["MyMemoryBackendSuite"].values())


def test_the_method_that_asks_a_frontend_is_missed_too(author) -> None:
    ran = author(
        "from faulty_frontends import Right\n"
        "class TestMine(FrontendSuite):\n"
        "    @pytest.fixture\n"
        "    def make_frontend(self):\n"
        "        return lambda controller, endpoint: Right(controller, 0)\n"
    )
    assert "does not define the method 'ask'" in ran.failed["TestMine"]["test_it_answers"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "    def codec(self): return Codec()",
            r"TestMine.codec must be a fixture: put @pytest.fix",
        ),
        ("    codec = Codec()", "TestMine.codec must be a fixture"),
        ("    def __init__(self): pass", "pytest ignores classes that have one"),
        (
            "    def test_noise_is_refused(self): pass",
            "TestMine.test_noise_is_refused replaces a test of CodecSuite without a reason",
        ),
        ("    test_noise_is_refused = None", "replaces a test of CodecSuite without a reason"),
        ("    @overrides('')\n    def test_noise_is_refused(self): pass", "needs a reason"),
        ("    @overrides\n    def test_noise_is_refused(self): pass", "needs a reason"),
        ("    @overrides('x')\n    def test_nose(self): pass", "overrides nothing. Known: test_a"),
    ],
)
def test_what_cannot_be_meant_is_refused(author, code: str, says: str) -> None:
    ran = author(f"{MINE}\nclass TestMine(CodecSuite):\n{code}\n")
    assert ran.code not in (0, 1)
    assert re.search(re.escape(says).replace(r"\ ", r"\s+"), ran.text), ran.text
    assert not ran.passed


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("TestMine.test_noise_is_refused = lambda self: None", "replaces a test of CodecSuite"),
        ("pytestmark = pytest.mark.skip", "is marked skip without a reason"),
        ("pytestmark = pytest.mark.xfail", "is marked xfail without a reason"),
    ],
)
def test_what_happens_behind_the_class_is_refused_when_tests_are_collected(
    author, code: str, says: str
) -> None:
    ran = author(f"{MINE}\n{code}\n")
    assert ran.code == pytest.ExitCode.USAGE_ERROR
    assert says in ran.text


def test_with_a_reason_a_test_may_be_replaced_or_skipped(author) -> None:
    ran = author(
        f"{MINE}\n"
        "    @overrides('ours is never noise')\n"
        "    def test_noise_is_refused(self): pass\n"
        "@pytest.mark.skip(reason='not today')\n"
        "class TestOther(CodecSuite): pass\n"
    )
    assert ran.code == 0, ran.text
    assert "test_noise_is_refused" in ran.passed["TestMine"]
    assert ran.skipped["TestOther"]


def test_a_base_of_ones_own_is_collected_only_where_it_is_used(author) -> None:
    ran = author(
        MINE.replace("CodecSuite):", "CodecSuite):\n    __test__ = False\n", 1)
        + "class TestTwo(TestMine): pass\n"
    )
    assert ran.code == 0, ran.text
    assert set(ran.passed) == {"TestTwo"}


def test_a_failing_check_shows_what_it_compared(author) -> None:
    """The suites' assertions are rewritten, like those in tests."""
    ran = author(
        "class Wrong(Codec):\n    format_version = 3\n"
        "    def describe(self, blob): return __import__('msgspec').structs.replace(\n"
        "        super().describe(blob), format_version=4)\n" + MINE.replace("Codec()", "Wrong()")
    )
    told = ran.failed["TestMine"]["test_describe_agrees_with_the_blob"]
    assert "assert 4 == 3" in told


def test_what_pytest_loads_everywhere_is_light() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import lmcache_kit._pytest_plugin;"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout) == ["lmcache_kit", "lmcache_kit._pytest_plugin"]


def test_pytest_finds_it_by_an_entry_point_and_the_extra_brings_what_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"lmcache_kit": "lmcache_kit._pytest_plugin"}
    extra = {re.split(r"\W", each)[0] for each in project["optional-dependencies"]["testing"]}
    assert extra == {"pytest", "hypothesis"}


def test_only_the_suites_import_pytest_and_hypothesis() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("lmcache_kit/**/*.py")
        if re.search(r"^\s*(import|from) (pytest|hypothesis)\b", path.read_text(), re.MULTILINE)
    }
    assert "lmcache_kit/testing/suite.py" in found
    assert all(
        name.startswith("lmcache_kit/testing/") or name == "lmcache_kit/_pytest_plugin.py"
        for name in found
    )


def test_every_check_is_documented_under_its_suite() -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    parts = re.split(r"^## `(\w+)`$", text, flags=re.MULTILINE)
    documented = {
        suite: set(re.findall(r"^\| `(test_\w+)` \|", body, flags=re.MULTILINE))
        for suite, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert documented == {
        name: {test for test in dir(getattr(testing, name)) if test.startswith("test_")}
        for name in SUITES
    }


def test_every_example_in_the_documentation_is_an_authors_whole_file() -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= len(SUITES)
    for block in blocks:
        ast.parse(block)
    for name in SUITES:
        assert f"({name}):" in text
