"""A controller and cache processes that report to it, started as programs."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from click.testing import CliRunner, Result

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.cli.app import app
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.keys import Namespace
from lmcache_kit.process.client import CacheClient
from lmcache_kit.service.launch import open_client
from tests.support import rest
from tests.support.processes import Program, program
from tests.support.stores import store
from tests.support.waiting import DEADLINE_S, eventually

INSTANCE = "lmcache_default_instance"


class Kit(NamedTuple):
    """A cache process of this configuration, and the controller's REST interface at ``url``."""

    url: str
    config: KitConfig
    namespace: Namespace

    def run(self, *arguments: str) -> Result:
        """Run ``lmcache-kit`` with these arguments against the controller."""
        return CliRunner().invoke(app, [*arguments, "--url", self.url])

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Return what the controller's REST interface answers: status and document."""
        return rest.ask(self.url + path, body)

    def ended(self, event_id: str) -> dict[str, Any]:
        """Wait until ``POST /check_finish`` says that an event has ended, and return the event."""
        eventually(
            lambda: (
                self.ask("/check_finish", {"event_id": event_id})[1]["status"]
                not in ("queued", "running")
            )
        )
        event: dict[str, Any] = self.ask(f"/events/{event_id}")[1]
        return event

    @contextmanager
    def worker(self) -> Iterator[CacheClient]:
        """Open a client as a worker of the instance does."""
        form = RankLayout(self.namespace.layout)
        client = open_client(self.config, role="worker", namespace=self.namespace, form=form)
        try:
            assert client.wait_ready(DEADLINE_S)
            yield client
        finally:
            client.close()


@contextmanager
def running_kit(
    folder: Path,
    tokens: list[int],
    namespace: Namespace,
    *,
    flags: tuple[str, ...] = (),
    **keys: object,
) -> Iterator[Kit]:
    """Start a controller and a cache process that holds ``tokens``; end them afterwards.

    ``flags`` are more arguments of the controller, ``keys`` of the cache process's configuration.
    """
    with running_kits(folder, namespace, {"c": keys}, flags=flags) as [kit]:
        with kit.worker() as client:
            store(client, namespace, tokens, smooth)
        yield kit


@contextmanager
def running_kits(
    folder: Path,
    namespace: Namespace,
    instances: Mapping[str, Mapping[str, object]],
    *,
    flags: tuple[str, ...] = (),
) -> Iterator[list[Kit]]:
    """Start a controller and cache processes.

    ``instances`` maps the name of a configuration file to the keys in it.
    """
    with ExitStack() as stack:
        ports = ("--port", "0", "--monitor-port", "0")
        line = _start(stack, "lmcache_controller", *ports, *flags).ready
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


def smooth(item: StoreItem) -> bytes:
    """Return a payload of float16 numbers that change slowly, as KV does."""
    count = item.nbytes // 2
    wave = np.sin(np.arange(count) / 9.0 + item.start) + 0.1 * np.cos(np.arange(count) * 1.7)
    return bytes(wave.astype(np.float16).data)


def _start(stack: ExitStack, name: str, *arguments: str) -> Program:
    running = Program(program(name), *arguments)
    stack.callback(running.end, signal.SIGTERM)
    return running
