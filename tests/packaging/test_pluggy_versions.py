"""The plugin-facing part of the kit under the oldest and the newest pluggy that it allows."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from tests.packaging.conftest import Make
from tests.packaging.distributions import CORE, ROOT

TESTS = str(ROOT / "tests" / "test_plugins.py")

pytestmark = pytest.mark.wheels


@pytest.mark.parametrize("wanted", ["pluggy==1.6.0", "pluggy>=1.6,<2"], ids=["oldest", "newest"])
def test_plugins_load_and_fail_alike(environment: Make, wanted: str) -> None:
    """Runs tests/test_plugins.py in an environment with that version."""
    made = environment(CORE, "lmcache-kit-http-api", extras=["testing"], without="pluggy")
    done = made.pip("install", "--no-deps", wanted)
    assert done.returncode == 0, done.stdout
    version = made.python("from importlib.metadata import version; print(version('pluggy'))")
    assert Requirement(wanted).specifier.contains(version)
    configuration = made.folder / "pytest.ini"
    configuration.write_text(
        "[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\nfilterwarnings = error\n"
        f"pythonpath = {ROOT}\n"
    )
    ran = made.run("python", "-m", "pytest", "-q", "-c", str(configuration), TESTS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.findall(r"(\d+) passed", ran.stdout)[0]) > 50
    assert "skipped" not in ran.stdout
