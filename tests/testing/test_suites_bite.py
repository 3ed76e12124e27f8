"""What is wrong is caught, by the check that is there for it, and what is right passes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.testing.conftest import Ran, Run

HERE = Path(__file__).parent
KINDS = sorted(HERE.glob("faulty_*.py"))
ENOUGH = {"backends": 20, "memory": 8, "codecs": 8, "transports": 8, "frontends": 8, "plugins": 8}


def kind_of(path: Path) -> str:
    return path.stem.removeprefix("faulty_")


def faults(path: Path) -> dict[str, str]:
    """``CAUGHT_BY``, without importing what is meant for another process."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CAUGHT_BY":
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.unparse(key).strip("'"): ast.literal_eval(value) for key, value in pairs}
    raise AssertionError(f"{path} says nothing")


FAULTS = [(path, name, check) for path in KINDS for name, check in faults(path).items()]


@pytest.fixture(scope="module")
def ran(run: Run) -> Iterator[Callable[[Path], Ran]]:
    """All faulty ones of a kind in one run, three runs at a time: the slow ones mostly wait."""
    with ThreadPoolExecutor(3) as pool:
        runs = {path: pool.submit(run, path) for path in sorted(KINDS, key=kind_of, reverse=True)}

        def result(path: Path) -> Ran:
            ran = runs[path].result()
            assert ran.passed["TestRight"], ran.text
            return ran

        yield result


@pytest.mark.parametrize(
    ("path", "name", "check"), FAULTS, ids=[f"{kind_of(path)}-{name}" for path, name, _ in FAULTS]
)
def test_a_fault_is_caught_by_the_check_that_is_there_for_it(
    ran: Callable[[Path], Ran], path: Path, name: str, check: str
) -> None:
    assert check in ran(path).failed[f"Test{name}"], f"{name} was not caught by {check}"


@pytest.mark.parametrize("path", KINDS, ids=kind_of)
def test_what_is_right_passes_every_check(ran: Callable[[Path], Ran], path: Path) -> None:
    result = ran(path)
    wrong = {f"Test{name}" for name in faults(path)}
    assert {name: failed for name, failed in result.failed.items() if name not in wrong} == {}
    assert len(result.passed["TestRight"]) > 10


@pytest.mark.parametrize("path", KINDS, ids=kind_of)
def test_a_fault_leaves_most_checks_alone(ran: Callable[[Path], Ran], path: Path) -> None:
    """Or else a check's name would tell an author nothing."""
    result = ran(path)
    share = {
        name: len(failed) / (len(failed) + len(result.passed[name]))
        for name, failed in result.failed.items()
    }
    assert sorted(share.values())[len(share) // 2] < 0.25, share


def test_there_are_enough_faults_of_each_kind() -> None:
    assert {kind_of(path) for path in KINDS} == set(ENOUGH)
    assert {
        kind: n for path in KINDS if len(faults(path)) < (n := ENOUGH[kind := kind_of(path)])
    } == {}
