"""Real programs: a controller and cache processes that take part in moves, each killable."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.process.client import CacheClient, Reconnect
from lmcache_kit.service.launch import open_client
from tests.support.waiting import eventually

BIN = Path(sys.executable).parent
WAIT_S = 40.0
PLACE = "LocalCPUBackend"
CHUNK = 256
LAYOUT = KVLayout("bfloat16", layers=4, kv_heads=2, head_dim=64)
BASE = Namespace("acme/model", LAYOUT, CHUNK)
CHUNK_BYTES = LAYOUT.payload_bytes(CHUNK)
"""512 KiB."""
QUICK = Reconnect(first_s=0.05, most_s=0.2, steady_s=0.0, broken_s=0.2, keep_memory_s=0.2)


def payload(tokens: Sequence[int], layout: KVLayout) -> bytes:
    """Bytes that only these tokens have."""
    seed = pack_tokens(tokens)
    nbytes = layout.payload_bytes(len(tokens))
    return (seed * (nbytes // len(seed) + 1))[:nbytes]


class Running:
    """One program; ``first`` is the line that it says it is ready with."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: dict[str, str], prefix: Sequence[str]
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, str(BIN / command[0]), *command[1:]],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.first = self._first_line()
        if not self.first:
            self.end()
            raise AssertionError(log.read_text())

    def _first_line(self) -> str:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
        return self.process.stdout.readline() if ready else ""

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP has stopped it."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        self.process.wait(WAIT_S)
        if self.process.stdout:
            self.process.stdout.close()


class Instance:
    """One cache process and, as long as that lives, a worker of it."""

    def __init__(
        self, fleet: Fleet, name: str, prefix: Sequence[str], keys: dict[str, Any]
    ) -> None:
        self.name = name
        self.file = fleet.folder / f"{name}.yaml"
        self.base: Namespace = keys.pop("base", BASE)
        self._environment: dict[str, str] = keys.pop("environment", {})
        self.prefix = prefix
        settings = {
            "chunk_size": self.base.chunk_size,
            "max_local_cpu_size": 64 / 1024,
            "enable_controller": "true",
            "controller_url": fleet.monitor,
            "lmcache_instance_id": name,
            "lmcache_worker_heartbeat_time": 0.2,
            "cache_process": "attach",
            "cache_socket": f"{fleet.folder}/{name}.sock",
            "enable_p2p": "true",
            "transfer_channel": "tcp",
            "blocking_timeout_secs": 20,
            **keys,
        }
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in settings.items()]
        self.file.write_text("".join(lines).replace('"true"', "true"))
        self.config: KitConfig = load_config(file=self.file, environ={}).config
        self.log = fleet.folder / f"{name}.log"
        self._fleet = fleet
        self.start()

    def start(self) -> None:
        command = ["lmcache-kit", "cache-server", "--config", str(self.file)]
        self.program = Running(command, self.log, self._environment, self.prefix)
        self.client: CacheClient = open_client(
            self.config,
            role="worker",
            namespace=self.base,
            form=RankLayout(self.base.layout),
            wait_ready=True,
            reconnect=QUICK,
        )
        eventually(
            lambda: any(
                worker["instance_id"] == self.name and worker["alive"]
                for worker in self._fleet.workers()
            ),
            f"{self.name} registers",
        )

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.client.close()
        self.program.end(number)

    def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.end(number)
        self.start()

    def store(self, tokens: Sequence[int]) -> None:
        """As a connector does, in batches."""
        packed = pack_tokens(tokens)
        links = list(chain(self.base.digest, packed, self.base.chunk_size))
        for start in range(0, len(links), 64):
            self._store(packed, links[start : start + 64])

    def _store(self, packed: bytes, links: Sequence[Any]) -> None:
        pieces = [packed[link.start * 4 : link.end * 4] for link in links]
        items = [
            StoreItem(
                link.parent, piece, self.base.layout.payload_bytes(len(piece) // 4), link.start
            )
            for link, piece in zip(links, pieces, strict=True)
        ]
        grants = self.client.allocate(self.base.digest, self.base.chunk_size, items)
        memory = self.client.memory(grants.incarnation)
        assert memory is not None
        written = []
        for item, piece, grant in zip(items, pieces, grants, strict=True):
            if grant.status == "granted":
                data = payload(memoryview(piece).cast("I").tolist(), self.base.layout)
                memory[grant.offset : grant.offset + item.nbytes] = data
                written.append((grant.ticket, xxh3_64_intdigest(data)))
        self.client.commit(written)

    def hit(self, tokens: Sequence[int]) -> int:
        """How many tokens are found, all of them with the bytes that were stored."""
        found = self.client.lookup(self.base.digest, pack_tokens(tokens), self.base.chunk_size)
        memory = self.client.memory(found.incarnation)
        for chunk in found.chunks:
            [extent] = chunk.extents
            assert memory is not None
            data = memory[extent.offset : extent.offset + extent.nbytes]
            whole = tokens[chunk.start : chunk.start + chunk.tokens]
            assert xxh3_64_intdigest(data) == extent.checksum
            if len(whole) == chunk.tokens:
                assert bytes(data) == payload(whole, self.base.layout)
        self.client.release(found.lease, everyone=True)
        return found.tokens

    def stats(self) -> dict[str, float]:
        return dict(self.client.stats().values)

    @property
    def idle(self) -> bool:
        """Whether nothing is held for anybody."""
        stats = self.stats()
        names = ("leases", "writers", "pending", "quarantined_bytes")
        return not any(stats[name] for name in names)

    def rest(self) -> None:
        """Wait until nothing is held."""
        eventually(lambda: self.idle, f"{self.name} holds something")


class Fleet:
    """A controller at ``host``, and the instances that report to it."""

    def __init__(self, folder: Path, stack: ExitStack, host: str, flags: Sequence[str]) -> None:
        self.folder = folder
        self._stack = stack
        self._host, self._flags = host, flags
        self.instances: dict[str, Instance] = {}
        self._monitor_port = self._port = 0
        self.controller = self.start_controller()

    def start_controller(self) -> Running:
        """Start one, on the ports of the last one."""
        command = ["lmcache_controller", "--host", self._host, "--port", str(self._port),
                   "--monitor-port", str(self._monitor_port), *self._flags]  # fmt: skip
        self.controller = Running(command, self.folder / "controller.log", {}, ())
        self._stack.callback(self.controller.end)
        http = re.search(r"http on (http://\S+?:(\d+))[;,]", self.controller.first)
        monitor = re.search(
            r"cache processes on (?:tcp://)?([^;\s,]+?:(\d+))", self.controller.first
        )
        assert http, self.controller.first
        assert monitor, self.controller.first
        self.url, self._port = http[1], int(http[2])
        self.monitor, self._monitor_port = monitor[1], int(monitor[2])
        return self.controller

    def instance(self, name: str, *, prefix: Sequence[str] = (), **keys: Any) -> Instance:
        """Start one; ``prefix`` is what to run it with."""
        made = self.instances[name] = Instance(self, name, prefix, keys)
        self._stack.callback(made.end)
        return made

    # REST.

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def workers(self) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = self.ask("/query_worker_info", {"instance_id": "all"})[1][
            "worker_infos"
        ]
        return infos

    def lookup(self, tokens: Sequence[int]) -> dict[str, int]:
        """Tokens by instance, as the controller knows it."""
        _, answer = self.ask("/lookup", {"tokens": list(tokens)})
        return {name: found[1] for name, found in answer["layout_info"].items()}

    def begin(
        self, source: str, goal: str, tokens: Sequence[int] | None = None, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        """POST /move."""
        body = {"old_position": [source, PLACE], "new_position": [goal, PLACE], **more}
        if tokens is not None:
            body["tokens"] = list(tokens)
        return self.ask("/move", body)

    def event(self, event_id: str) -> dict[str, Any]:
        return self.ask(f"/events/{event_id}")[1]

    def ended(self, event_id: str) -> dict[str, Any]:
        """Wait for the end of an event."""
        eventually(lambda: self.event(event_id)["state"] not in ("queued", "running"), event_id)
        return self.event(event_id)

    def move(
        self, source: str, goal: str, tokens: Sequence[int] | None = None, **more: Any
    ) -> dict[str, Any]:
        """Move, and wait for the end."""
        status, reply = self.begin(source, goal, tokens, **more)
        assert status == 200, reply
        return self.ended(reply["event_id"])


@contextmanager
def fleet_in(folder: Path, host: str = "localhost", *flags: str) -> Iterator[Fleet]:
    """A fleet; everything is ended in the end."""
    with ExitStack() as stack:
        yield Fleet(folder, stack, host, flags)


@contextmanager
def short_path() -> Iterator[Path]:
    """A folder; Unix sockets allow no long names."""
    folder = Path(tempfile.mkdtemp(prefix="lk-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
