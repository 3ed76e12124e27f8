"""Start a controller and cache processes as programs, for the benchmarks of moves."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.config import KitConfig
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.process.client import CacheClient
from lmcache_kit.service.launch import open_client

BIN = Path(sys.executable).parent
LOCATION = "LocalCPUBackend"
WAIT_S = 60.0
BATCH = 16
LLAMA = KVLayout("bfloat16", layers=32, kv_heads=8, head_dim=128)
SMOLLM2 = KVLayout("bfloat16", layers=30, kv_heads=3, head_dim=64)


def until(holds: Callable[[], object], what: str, pause_s: float = 0.02) -> None:
    """Wait until the condition holds; raise TimeoutError after ``WAIT_S``."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"timed out after {WAIT_S:g} s: {what}")
        time.sleep(pause_s)


class Program:
    """A running program; ``first`` is the line that it prints when it is ready."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
        self.first = self.process.stdout.readline() if ready else ""
        if not self.first:
            self.end()
            raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        if self.process.stdout:
            self.process.stdout.close()


class Controller:
    """A controller, and one connection to its REST frontend."""

    def __init__(self, folder: Path) -> None:
        command = ["lmcache_controller", "--host", "127.0.0.1", "--port", "0"]
        self._program = Program([*command, "--monitor-port", "0"], folder / "controller.log")
        found = re.search(r"http on http://(\S+?:\d+)[;,]", self._program.first)
        monitor = re.search(r"cache processes on (?:tcp://)?([^;\s,]+?:\d+)", self._program.first)
        assert found, self._program.first
        assert monitor, self._program.first
        self.monitor = monitor[1]
        self._connection = http.client.HTTPConnection(found[1], timeout=WAIT_S)

    @property
    def pid(self) -> int:
        return self._program.process.pid

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        method = "GET" if body is None else "POST"
        self._connection.request(method, path, None if body is None else json.dumps(body))
        with self._connection.getresponse() as reply:
            answer: dict[str, Any] = json.load(reply)
        if reply.status != 200:
            raise RuntimeError(f"{path}: {answer}")
        return answer

    def registered(self, name: str) -> bool:
        infos = self.ask("/query_worker_info", {"instance_id": "all"})["worker_infos"]
        return any(info["instance_id"] == name and info["alive"] for info in infos)

    def move(self, source: str, destination: str, tokens: Sequence[int], **more: Any) -> str:
        """Request a move; return its event ID."""
        body = {"old_position": [source, LOCATION], "new_position": [destination, LOCATION]}
        return str(self.ask("/move", {**body, "tokens": list(tokens), **more})["event_id"])

    def ended(self, event_id: str, pause_s: float = 0.005) -> dict[str, Any]:
        """Wait for the end of an operation; raise RuntimeError unless it succeeded."""
        found: dict[str, Any] = {}

        def over() -> bool:
            found.update(self.ask(f"/events/{event_id}"))
            return found["state"] not in ("queued", "running")

        until(over, event_id, pause_s)
        if found["state"] != "done":
            raise RuntimeError(f"an operation failed: {found}")
        return found

    def clear(self, name: str, tokens: Sequence[int]) -> None:
        """Delete the chunks of these tokens from an instance."""
        body = {"instance_id": name, "location": LOCATION, "tokens": list(tokens)}
        self.ended(self.ask("/clear", body)["event_id"])

    def end(self) -> None:
        self._connection.close()
        self._program.end()


class Instance:
    """A cache process, and a worker that stores KV of one namespace in it."""

    def __init__(
        self, folder: Path, controller: Controller, name: str, namespace: Namespace, **keys: Any
    ) -> None:
        self.name, self.namespace = name, namespace
        values = settings(folder, controller, name, **keys)
        self.config = KitConfig(**values)
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(values))
        self._program = Program(
            ["lmcache-kit", "cache-server", "--config", str(file)], folder / f"{name}.log"
        )
        self.client = worker(self.config, namespace)
        until(lambda: controller.registered(name), f"{name} registers")

    @property
    def pid(self) -> int:
        return self._program.process.pid

    def end(self) -> None:
        self.client.close()
        self._program.end()


class Fleet:
    """A controller and instances; the context manager ends all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ending = ExitStack()
        self.controller = Controller(folder)
        self._ending.callback(self.controller.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.close()

    def instance(self, name: str, namespace: Namespace, **keys: Any) -> Instance:
        made = Instance(self.folder, self.controller, name, namespace, **keys)
        self._ending.callback(made.end)
        return made


def settings(folder: Path, controller: Controller, name: str, **keys: Any) -> dict[str, Any]:
    """Return the configuration of an instance that takes part in moves."""
    return {
        "max_local_cpu_size": 0.25,
        "enable_controller": True,
        "controller_url": controller.monitor,
        "lmcache_instance_id": name,
        "cache_process": "attach",
        "cache_socket": f"{folder}/{name}.sock",
        "enable_p2p": True,
        "p2p_host": "127.0.0.1",
        "blocking_timeout_secs": 20.0,
        **keys,
    }


def worker(config: KitConfig, namespace: Namespace) -> CacheClient:
    """Return a client that can store."""
    return open_client(
        config,
        role="worker",
        namespace=namespace,
        form=RankLayout(namespace.layout),
        wait_ready=True,
    )


def store(client: CacheClient, namespace: Namespace, tokens: Sequence[int]) -> int:
    """Store in batches, as a connector does; return the number of bytes."""
    packed = pack_tokens(tokens)
    links = list(chain(namespace.digest, packed, namespace.chunk_size))
    total = 0
    for start in range(0, len(links), BATCH):
        items = [
            StoreItem(
                link.parent,
                packed[link.start * 4 : link.end * 4],
                namespace.layout.payload_bytes(link.end - link.start),
                link.start,
            )
            for link in links[start : start + BATCH]
        ]
        grants = client.allocate(namespace.digest, namespace.chunk_size, items)
        memory = client.memory(grants.incarnation)
        assert memory is not None
        written = []
        for item, grant in zip(items, grants, strict=True):
            assert grant.status == "granted", grant.status
            with memory[grant.offset : grant.offset + item.nbytes] as view:
                view[:] = item.tokens[:4] * (item.nbytes // 4)
                written.append((grant.ticket, xxh3_64_intdigest(view)))
            total += item.nbytes
        client.commit(written)
    return total


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
