"""What holds for every test: settings that vLLM reads when it is imported, a runtime directory of
its own, and a clean environment."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sites import FakeSite

VLLM_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_RUNTIME_DIR = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported. Sockets' paths must be short."""
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        del os.environ[name]
    for name in ("CI", "BUILD_NUMBER"):  # with these, pytest works for hours at the whole
        os.environ.pop(name, None)  # difference of two times a megabyte, when a test fails
    os.environ.update(VLLM_SETTINGS)
    runtime_dir = tempfile.mkdtemp(prefix="kit-")
    config.stash[_RUNTIME_DIR] = runtime_dir
    os.environ["XDG_RUNTIME_DIR"] = runtime_dir


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash.get(_RUNTIME_DIR, ""), ignore_errors=True)


# Which tests share an engine, or wheels: these stay together on one worker. The slow ones begin, so
# that no worker is left with them in the end.
TOGETHER = ("tests/vllm", "tests/packaging", "tests/scaffold")
SLOW_FIRST = (
    "tests/vllm",
    "tests/serve/test_serve.py",
    "tests/peer/test_processes.py",
    "tests/serve/test_move.py",
    "tests/testing/test_suites_bite.py",
    "tests/packaging",
    "tests/scaffold",
)


def group_of(nodeid: str) -> str:
    """What runs on one worker, one after the other."""
    file = nodeid.partition("::")[0]
    folder = file.rpartition("/")[0]
    return folder if folder in TOGETHER else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip by name what needs a GPU, and begin with what is slow unless the order is random."""
    if not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
    if config.pluginmanager.hasplugin("randomly"):
        return
    ranks = {group: rank for rank, group in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: ranks.get(group_of(item.nodeid), len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups of tests, each for the next worker that is free."""
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def remove_node(self, node: Any) -> str | None:
            """What took its worker with it has failed: the next worker goes on behind it."""
            for tests in self.assigned_work[node].values():
                for nodeid, done in tests.items():
                    if not done:
                        tests[nodeid] = True
                        super().remove_node(node)
                        return nodeid
            return super().remove_node(node)

    return InGroups(config, log)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSite]:
    """Install distributions on disk; forget their modules afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield FakeSite(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith(("acme", "lmcache_kit_acme")):
            del sys.modules[name]
