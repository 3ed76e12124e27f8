"""What holds for every test: settings that vLLM reads when it is imported, a runtime directory of
its own, and a clean environment."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

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
    os.environ.update(VLLM_SETTINGS)
    runtime_dir = tempfile.mkdtemp(prefix="kit-")
    config.stash[_RUNTIME_DIR] = runtime_dir
    os.environ["XDG_RUNTIME_DIR"] = runtime_dir


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash.get(_RUNTIME_DIR, ""), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what needs a GPU; run what starts vLLM last."""
    if not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)
