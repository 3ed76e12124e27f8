"""Our programs, started as people start them: a controller, and a cache process that reports to it
the KV of TOKENS, as a connector stored it."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from click.testing import CliRunner, Result
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.cli.app import app
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.process.client import CacheClient
from lmcache_kit.service.launch import open_client

BIN = Path(sys.executable).parent
WAIT_S = 30
INSTANCE = "lmcache_default_instance"


class Kit(NamedTuple):
    """Where the controller serves REST, how the cache process was configured, and what lies
    there."""

    url: str
    config: KitConfig
    namespace: Namespace

    def run(self, *arguments: str) -> Result:
        """``lmcache-kit`` with these arguments, asking our controller."""
        return CliRunner().invoke(app, [*arguments, "--url", self.url])

    @contextmanager
    def worker(self) -> Iterator[CacheClient]:
        """A worker of the instance."""
        form = RankLayout(self.namespace.layout)
        client = open_client(self.config, role="worker", namespace=self.namespace, form=form)
        try:
            assert client.wait_ready(WAIT_S)
            yield client
        finally:
            client.close()


def ask(kit: Kit, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """What the controller's REST interface answers: status and document."""
    try:
        with urllib.request.urlopen(urllib.request.Request(kit.url + path, body)) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def post(kit: Kit, path: str, body: dict[str, object]) -> tuple[int, Any]:
    return ask(kit, path, json.dumps(body).encode())


@contextmanager
def running_kit(
    folder: Path,
    tokens: list[int],
    namespace: Namespace,
    *,
    flags: tuple[str, ...] = (),
    **keys: object,
) -> Iterator[Kit]:
    """All of it, with ``tokens`` stored; ended afterwards. ``flags``: more for the controller."""
    with running_kits(folder, namespace, {"c": keys}, flags=flags) as [kit]:
        with kit.worker() as client:
            store(client, namespace, tokens)
        yield kit


@contextmanager
def running_kits(
    folder: Path,
    namespace: Namespace,
    instances: Mapping[str, Mapping[str, object]],
    *,
    flags: tuple[str, ...] = (),
) -> Iterator[list[Kit]]:
    """A controller, and cache processes with these files and keys; nothing is stored yet."""
    with ExitStack() as stack:
        line = _start(stack, "lmcache_controller", "--port", "0", "--monitor-port", "0", *flags)
        http = re.search(r"http on (http://\S+?)[;,]", line)
        monitor = re.search(r"cache processes on (?:tcp://)?([^;\s,]+)", line)
        assert http, line
        assert monitor, line
        kits = []
        for name, keys in instances.items():
            settings = {
                "chunk_size": namespace.chunk_size,
                "max_local_cpu_size": 0.01,
                "enable_controller": "true",
                "controller_url": monitor[1],
                "cache_process": "attach",
                "cache_socket": f"{folder}/{name}.sock",
                **keys,
            }
            file = folder / f"{name}.yaml"
            file.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
            _start(stack, "lmcache-kit", "cache-server", "--config", str(file))
            kits.append(Kit(http[1], load_config(file=file, environ={}).config, namespace))
        yield kits


def store(client: CacheClient, namespace: Namespace, tokens: list[int]) -> None:
    """As a connector does."""
    items = list(items_of(namespace, tokens))
    grants = client.allocate(namespace.digest, namespace.chunk_size, items)
    assert [grant.status for grant in grants] == ["granted"] * len(items)
    memory = client.memory(grants.incarnation)
    assert memory is not None
    written = []
    for item, grant in zip(items, grants, strict=True):
        data = payload(item)
        memory[grant.offset : grant.offset + item.nbytes] = data
        written.append((grant.ticket, xxh3_64_intdigest(data)))
    assert client.commit(written) == len(items)


def items_of(namespace: Namespace, tokens: list[int]) -> Iterator[StoreItem]:
    """The chunks of a prompt."""
    packed = pack_tokens(tokens)
    for link in chain(namespace.digest, packed, namespace.chunk_size):
        nbytes = namespace.layout.payload_bytes(link.end - link.start)
        yield StoreItem(link.parent, packed[link.start * 4 : link.end * 4], nbytes, link.start)


def payload(item: StoreItem) -> bytes:
    """Smooth numbers, as KV is: float16."""
    count = item.nbytes // 2
    wave = np.sin(np.arange(count) / 9.0 + item.start) + 0.1 * np.cos(np.arange(count) * 1.7)
    return wave.astype(np.float16).tobytes()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _start(stack: ExitStack, *command: str) -> str:
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
