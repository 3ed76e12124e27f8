"""The page of metrics has those that there are, and no other ones."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from lmcache_kit_http_api.metrics import HttpMetrics

from lmcache_kit.config import KitConfig
from lmcache_kit.controller.controller import Controller
from lmcache_kit.service.launch import open_client
from lmcache_kit.testing.controller import FakeController

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
SESSION = (ROOT / "lmcache_kit" / "agent" / "controller_client.py").read_text()
TIER = "LocalDiskBackend"


def named(heading: str) -> list[str]:
    """The names in the table below a heading."""
    text = re.split(rf"^#+ {re.escape(heading)}$", PAGE, flags=re.MULTILINE)[1]
    table = re.split(r"^#+ ", text, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `(\w+)` \| (?=\S)", table, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def cache_process() -> Iterator[set[str]]:
    """What a cache process with everything in it counts."""
    with tempfile.TemporaryDirectory() as folder:
        config = KitConfig(
            cache_process="embedded",
            cache_socket=Path(folder) / "private" / "cache.sock",
            max_local_cpu_size=0.01,
            tiers=("LocalDiskBackend",),
            backend_options={
                "LocalDiskBackend": {"path": f"{folder}/kv", "max_size_gib": 0.01},
            },
            enable_controller=True,
            controller_url="127.0.0.1:9",
            enable_p2p=True,
            transfer_channel="tcp",
            store_codec="cachegen",
        )
        with closing(open_client(config, role="tool")) as client:
            assert client.wait_ready(20)
            yield set(client.stats().values)


def test_all_of_the_controller_are_documented() -> None:
    assert named("Controller") == sorted(Controller("127.0.0.1", [0]).counters())


def test_all_of_the_rest_frontend_are_documented() -> None:
    metrics = HttpMetrics(FakeController())
    metrics.answered("GET", "/healthz", 200, 0.1)
    text = metrics.render().body.decode()
    shown = set(re.findall(r"^# TYPE (lmcache_kit_http_\w+) ", text, flags=re.MULTILINE))
    assert set(named("Frontend `http`")) == {name for name in shown if "_created" not in name}


def test_all_of_a_cache_process_are_documented(cache_process: set[str]) -> None:
    own = {name for name in cache_process if not name.startswith(("agent_", f"{TIER}_"))}
    assert named("Memory") == sorted(own)


def test_all_of_a_tier_are_documented(cache_process: set[str]) -> None:
    own = {name.removeprefix(f"{TIER}_") for name in cache_process if name.startswith(TIER)}
    assert named("Each tier") == sorted(own)


def test_all_of_the_agent_are_documented(cache_process: set[str]) -> None:
    own = {name.removeprefix("agent_") for name in cache_process if name.startswith("agent_")}
    counted = set(re.findall(r'\bcounts\["(\w+)"\]', SESSION)) | {"failures_total"}
    assert named("Agent") == sorted(own | counted)
