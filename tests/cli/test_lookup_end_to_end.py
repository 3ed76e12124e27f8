"""``lmcache-kit lookup`` through a real controller, of what a real cache process holds."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.cli.app import app
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.process.client import CacheClient
from lmcache_kit.process.life import open_client

BIN = Path(sys.executable).parent
WAIT_S = 30
CHUNK = 4
TOKENS = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
NAMESPACE = Namespace("model", KVLayout("float16", 1, 1, 8), CHUNK)


def start(stack: ExitStack, *command: str) -> str:
    """Start one of our programs and return the first line that it prints."""
    process = stack.enter_context(
        subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(process.terminate)
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
    assert ready
    return process.stdout.readline()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A controller's address. A cache process reports to it the KV of TOKENS, as a connector
    stored it."""
    with ExitStack() as stack:
        line = start(stack, "lmcache_controller", "--port", "0", "--monitor-port", "0")
        http = re.search(r"http on (http://\S+?)[;,]", line)
        monitor = re.search(r"cache processes on (?:tcp://)?([^;\s,]+)", line)
        assert http, line
        assert monitor, line
        file = tmp_path / "kit.yaml"
        file.write_text(
            f"chunk_size: {CHUNK}\nmax_local_cpu_size: 0.01\nlmcache_instance_id: one\n"
            f"enable_controller: true\ncontroller_url: {monitor[1]}\n"
            f"cache_process: attach\ncache_socket: {tmp_path}/c.sock\n"
        )
        start(stack, "lmcache-kit", "cache-server", "--config", str(file))
        store(load_config(file=file, environ={}).config)
        yield http[1]


def store(config: KitConfig) -> None:
    client = open_client(config, role="worker", namespace=NAMESPACE)
    try:
        assert client.wait_ready(WAIT_S)
        items = [
            StoreItem(chunk.parent, pack_tokens(TOKENS[chunk.start : chunk.end]), 64)
            for chunk in chain(NAMESPACE.digest, pack_tokens(TOKENS), CHUNK)
        ]
        commit(client, items)
    finally:
        client.close()


def commit(client: CacheClient, items: list[StoreItem]) -> None:
    grants = client.allocate(NAMESPACE.digest, CHUNK, items)
    assert [grant.status for grant in grants] == ["granted"] * len(items)
    assert client.commit([(grant.ticket, 0) for grant in grants]) == len(items)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lookup(url: str, *arguments: str) -> str:
    return CliRunner().invoke(app, ["lookup", "--url", url, *arguments]).output


def test_what_is_stored_is_found_and_counted_in_tokens(url: str) -> None:
    words = [str(token) for token in TOKENS]
    eventually(lambda: "10 of 10" in lookup(url, *words))
    row = lookup(url, *words, "99").splitlines()[1].split()
    assert row == ["one", "LocalCPUBackend", "10", "of", "11", "missing"]
    answer = json.loads(lookup(url, "--json", *words))
    assert answer["one"] == ["LocalCPUBackend", 10]
    assert answer["layout_info"] == {"one": ["LocalCPUBackend", 10]}
    assert lookup(url, "99") == "No instance holds KV of these tokens.\n"
