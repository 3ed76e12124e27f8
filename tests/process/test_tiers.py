"""A disk below memory, with real cache processes that end, are killed and come back."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import ConfigError
from lmcache_kit.keys import chain, pack_tokens
from lmcache_kit.plugins import Plugins
from lmcache_kit.service import build, service
from lmcache_kit.service.build import build_tiers
from tests.support.waiting import DEADLINE_S as WAIT_S

if TYPE_CHECKING:
    from lmcache_kit.process.client import CacheClient
    from tests.process.conftest import Configure, Connect, Eventually
    from tests.support.sites import FakeSite

NAMESPACE = bytes(32)
CHUNK = 16
NBYTES = 5000
LOCATION = "LocalDiskBackend"

SLOW = """
import threading

MAY_OPEN = threading.Event()

@hookimpl
def register_backends():
    return [BackendSpec("AcmeSlow", "acme_slow:slow", "Opens when it may.")]

def slow():
    MAY_OPEN.wait(60)
    raise OSError("a disk that is far away")
"""
PICKY = """
from lmcache_kit.errors import ConfigError

@hookimpl
def register_backends():
    return [BackendSpec("AcmePicky", "acme_picky:picky", "Does not open.")]

def picky():
    raise ConfigError("no such profile")
"""


@pytest.fixture
def disk(folder: Path) -> dict[str, object]:
    """Keys of a configuration."""
    options = {"path": str(folder / "kv"), "max_size_gib": 1.0}
    return {"tiers": [LOCATION], "backend_options": {LOCATION: options}}


def content(tokens: bytes) -> bytes:
    return (tokens * NBYTES)[:NBYTES]


def store(client: CacheClient, first: int, chunks: int = 4) -> bytes:
    """The tokens of a prompt that is stored now."""
    tokens = pack_tokens(range(first, first + chunks * CHUNK))
    links = list(chain(NAMESPACE, tokens, CHUNK))
    items = [
        StoreItem(link.parent, tokens[link.start * 4 : link.end * 4], NBYTES, link.start)
        for link in links
    ]
    grants = client.allocate(NAMESPACE, CHUNK, items)
    memory = client.memory(grants.incarnation)
    assert memory is not None
    written = []
    for item, grant in zip(items, grants, strict=True):
        if grant.status == "granted":
            data = content(item.tokens)
            memory[grant.offset : grant.offset + NBYTES] = data
            written.append((grant.ticket, xxh3_64_intdigest(data)))
    client.commit(written)
    return tokens


def hit(client: CacheClient, tokens: bytes) -> int:
    """How many tokens a lookup finds; their bytes are what was stored."""
    found = client.lookup(NAMESPACE, tokens, CHUNK)
    memory = client.memory(found.incarnation)
    assert memory is not None
    for located in found.chunks:
        [extent] = located.extents
        data = bytes(memory[extent.offset : extent.offset + extent.nbytes])
        assert data == content(tokens[located.start * 4 : located.end * 4])
    if found.lease:
        client.release(found.lease, everyone=True)
    return found.tokens


def written(client: CacheClient) -> float:
    return client.stats().lower_tiers[LOCATION]["written_chunks_total"]


def test_what_is_on_disk_is_found_after_the_process_was_killed(
    connect: Connect, eventually: Eventually, disk: dict[str, object]
) -> None:
    client = connect(**disk)
    prompts = [store(client, number * 1000) for number in range(5)]
    eventually(lambda: written(client) == 20)
    before = client.incarnation
    os.kill(client.stats().pid, signal.SIGKILL)
    eventually(lambda: client.connected and client.incarnation != before)
    for tokens in prompts:
        eventually(lambda tokens=tokens: hit(client, tokens) == 4 * CHUNK)  # type: ignore[misc]
    assert client.stats().values["promoted_chunks_total"] == 20


def test_kills_at_any_moment_leave_only_what_is_right(
    connect: Connect, eventually: Eventually, disk: dict[str, object]
) -> None:
    client = connect(**disk)
    prompts: list[bytes] = []
    for life in range(4):
        before = client.incarnation
        for number in range(3 * life + 1):
            prompts.append(store(client, 10_000 * life + 1000 * number))
        os.kill(client.stats().pid, signal.SIGKILL)
        eventually(lambda: client.connected and client.incarnation != before)  # noqa: B023
        for tokens in prompts:
            assert hit(client, tokens) % CHUNK == 0
    assert client.stats().lower_tiers[LOCATION]["corrupt_total"] == 0


def test_a_process_that_ends_writes_what_waits_first(
    connect: Connect, eventually: Eventually, disk: dict[str, object]
) -> None:
    with connect(**disk) as client:
        prompts = [store(client, number * 1000) for number in range(10)]
        pid = client.stats().pid
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    again = connect(**disk)
    for tokens in prompts:
        eventually(lambda tokens=tokens: hit(again, tokens) == 4 * CHUNK)  # type: ignore[misc]


def test_what_does_not_fit_into_memory_is_served_from_disk(
    connect: Connect, disk: dict[str, object], eventually: Eventually
) -> None:
    client = connect(max_local_cpu_size=100_000 / (1 << 30), **disk)
    prompts = []
    for number in range(20):
        prompts.append(store(client, number * 1000))
        eventually(lambda: written(client) == 4 * len(prompts))
    assert [hit(client, tokens) for tokens in prompts] == [4 * CHUNK] * 20
    assert client.stats().values["evicted_chunks_total"] > 60


def test_a_tier_that_cannot_be_opened_is_left_out_until_it_can_be(
    connect: Connect,
    disk: dict[str, object],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
) -> None:
    (folder / "kv").write_text("a file")
    client = connect(**disk)
    tokens = store(client, 0)
    assert hit(client, tokens) == 4 * CHUNK
    assert client.stats().lower_tiers[LOCATION]["down"] == 1
    said = "LocalDiskBackend does not work; serving goes on without it"
    [line] = eventually(lambda: [each for each in caplog.records if said in each.getMessage()])
    assert line.levelname == "ERROR"
    assert f"cannot use {folder}/kv/" in line.getMessage()
    assert "A file has that name: set another path" in line.getMessage()
    (folder / "kv").unlink()
    eventually(lambda: not client.stats().lower_tiers[LOCATION]["down"])
    later = store(client, 1000)
    eventually(lambda: written(client) == 4)
    assert hit(client, later) == 4 * CHUNK
    assert "INFO lmcache_kit.cache.tiers.circuit_breaker: LocalDiskBackend works now" in (
        (folder / "c.sock.log").read_text()
    )
    assert len([each for each in caplog.records if "does not work" in each.getMessage()]) == 1


def test_a_vllm_that_comes_later_hears_of_a_tier_that_is_down(
    connect: Connect,
    disk: dict[str, object],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "kv").write_text("a file")
    client = connect(cache_process="embedded", **disk)
    eventually(lambda: client.stats().lower_tiers[LOCATION]["down"])
    connect(cache_process="embedded", **disk).stats()
    assert "still does not work" not in caplog.text  # they came together
    monkeypatch.setattr(service, "REMIND_AFTER_S", 0.0)
    connect("scheduler", cache_process="embedded", **disk).stats()
    connect(cache_process="embedded", **disk).stats()
    assert caplog.text.count(f"{LOCATION} still does not work: ") == 1


def test_a_tier_that_does_not_open_in_time_keeps_nobody_waiting(
    configure: Configure, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("acme-slow", SLOW)
    monkeypatch.setattr(build, "OPEN_S", 0.05)
    plugins = Plugins.load()
    config = configure(tiers=["AcmeSlow"])
    [tier] = build_tiers(config, plugins, lambda name: None)  # type: ignore[arg-type,return-value]
    acme = sys.modules["acme_slow"]
    try:
        tier.start()
        assert tier.executor.flush(WAIT_S)
        assert "still being opened" in tier.store.why_down
    finally:
        acme.MAY_OPEN.set()  # type: ignore[attr-defined]
        tier.close()


def test_an_option_that_a_backend_refuses_as_it_opens_is_a_mistake(
    configure: Configure, site: FakeSite
) -> None:
    site.install("acme-picky", PICKY)
    config = configure(tiers=["AcmePicky"])
    with pytest.raises(ConfigError, match="no such profile"):
        build_tiers(config, Plugins.load(), lambda name: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_size_gb": 3}, r"LocalDiskBackend\.max_size_gb: Extra inputs are not permitted"),
        ({"max_size_gib": "much"}, r"LocalDiskBackend\.max_size_gib: .*valid number"),
    ],
)
def test_options_that_a_backend_does_not_take_are_named(
    configure: Configure, disk: dict[str, object], options: dict[str, object], message: str
) -> None:
    config = configure(**disk | {"backend_options": {LOCATION: options}})
    with pytest.raises(ConfigError, match=message):
        build_tiers(config, Plugins.load(), lambda name: None)  # type: ignore[arg-type,return-value]


def test_memory_is_no_tier(configure: Configure) -> None:
    with pytest.raises(ValueError, match="LocalCPUBackend is none of them"):
        configure(tiers=["LocalCPUBackend"])
