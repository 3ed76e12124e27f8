"""What is counted is what is declared, and the reference shows every declaration."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from lmcache_kit_http_api.metrics import HTTP, HttpMetrics

from lmcache_kit.agent.metrics import AGENT
from lmcache_kit.cache.metrics import LOWER_TIER, MEMORY
from lmcache_kit.config import load_config
from lmcache_kit.controller.controller import Controller
from lmcache_kit.controller.metrics import CONTROLLER
from lmcache_kit.metrics import MetricSet, counter, gauge
from lmcache_kit.protocol.local import Stats
from lmcache_kit.service.launch import open_client
from lmcache_kit.service.metrics import CACHE_PROCESS
from lmcache_kit.testing.controller import FakeController
from tools.docs import metrics

TIER = "LocalDiskBackend"


@pytest.fixture(scope="module")
def cache_process() -> Iterator[Stats]:
    """What a cache process with everything in it counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kit.yaml"
        file.write_text(
            f"""
            cache_process: embedded
            cache_socket: {folder}/private/cache.sock
            max_local_cpu_size: 0.01
            local_disk: {folder}/kv
            max_local_disk_size: 0.01
            enable_controller: true
            controller_url: "127.0.0.1:9"
            enable_p2p: true
            transfer_channel: tcp
            store_codec: cachegen
            """
        )
        config = load_config(file=file, environ={}).config
        with closing(open_client(config, role="tool")) as client:
            assert client.wait_ready(20)
            yield client.stats()


def test_a_controller_counts_what_is_declared() -> None:
    assert Controller("127.0.0.1", [0]).counters().keys() == CONTROLLER.by_name.keys()


def test_the_rest_frontend_counts_what_is_declared() -> None:
    served = HttpMetrics(FakeController())
    served.answered(None, 200, 0.1)
    text = served.render().body.decode()
    shown = set(re.findall(r"^# TYPE lmcache_kit_http_(\w+) ", text, flags=re.MULTILINE))
    assert {name for name in shown if not name.endswith("_created")} == HTTP.by_name.keys()


def test_prometheus_is_told_the_declared_help() -> None:
    served = HttpMetrics(FakeController())
    text = served.render().body.decode()
    assert "# HELP lmcache_kit_controller_lookups_total Lookups answered." in text
    assert "# TYPE lmcache_kit_controller_lookups_total counter" in text


def test_a_cache_process_counts_what_is_declared(cache_process: Stats) -> None:
    declared = {
        *CACHE_PROCESS.by_name,
        *MEMORY.by_name,
        *(f"agent_{each}" for each in AGENT.by_name),
    }
    assert cache_process.values.keys() == declared


def test_a_lower_tier_counts_what_is_declared_with_its_location_as_a_label(
    cache_process: Stats,
) -> None:
    assert {name: values.keys() for name, values in cache_process.lower_tiers.items()} == {
        TIER: LOWER_TIER.by_name.keys()
    }


def test_every_declared_metric_is_in_the_reference() -> None:
    [page] = metrics.page().values()
    for declared in metrics.SETS:
        for spec in declared:
            assert f"| `{declared.prefix}{spec.name}` | {spec.kind} |" in page
            assert spec.help in page


def test_a_metric_is_declared_once() -> None:
    chunks = gauge("chunks", "chunks", "Chunks.")
    with pytest.raises(ValueError, match="the test declares a metric twice"):
        MetricSet("the test", "", (chunks, chunks))


def test_counters_end_in_total_and_gauges_do_not() -> None:
    with pytest.raises(ValueError, match="counter 'chunks' does not end in _total"):
        counter("chunks", "chunks", "Chunks.")
    with pytest.raises(ValueError, match="gauge 'chunks_total' ends in _total"):
        gauge("chunks_total", "chunks", "Chunks.")
