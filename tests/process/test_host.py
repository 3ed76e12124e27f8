"""What a cache process is composed of: plugins that hear of it, and the agent."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.controller.controller import Controller
from lmcache_kit.errors import UnknownName
from lmcache_kit.interfaces import CacheInfo, LookupQuery
from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.plugins import Plugins
from lmcache_kit.process.client import Reconnect
from lmcache_kit.service.launch import open_client

if TYPE_CHECKING:
    from lmcache_kit.process.client import CacheClient
    from tests.process.conftest import Configure, Connect, Eventually, Script

NAMESPACE = Namespace("a-model", KVLayout("float16", 2, 2, 8), chunk_size=4)
TOKENS = list(range(6))
QUICK = Reconnect(first_s=0.02, most_s=0.1)


class RunningController:
    """A controller on a thread of its own, asked from the test's."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.controller = Controller("127.0.0.1", [0])
        asyncio.run_coroutine_threadsafe(self.controller.start(), self._loop).result()

    @property
    def url(self) -> str:
        return self.controller.endpoints[0].removeprefix("tcp://")

    def ask(self, question: Callable[[Controller], object]) -> object:
        async def asked() -> object:
            return question(self.controller)

        return asyncio.run_coroutine_threadsafe(asked(), self._loop).result()

    def found(self, tokens: list[int]) -> int:
        """How many of the tokens the controller knows to be somewhere."""

        def question(controller: Controller) -> int:
            instances = controller.instances.lookup(LookupQuery(tokens)).instances
            return instances[0].best.tokens if instances else 0

        answer = self.ask(question)
        assert isinstance(answer, int)
        return answer

    def ranks(self) -> object:
        try:
            return self.ask(
                lambda controller: [each.worker_id for each in controller.instances.workers()]
            )
        except UnknownName:
            return []

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.controller.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def controller() -> Iterator[RunningController]:
    running = RunningController()
    yield running
    running.stop()


@pytest.fixture
def worker(configure: Configure, controller: RunningController) -> Iterator[CacheClient]:
    """The only rank of an instance that reports to the controller."""
    config = configure(
        enable_controller=True,
        controller_url=controller.url,
        lmcache_worker_heartbeat_time=0.1,
    )
    with open_client(
        config, role="worker", namespace=NAMESPACE, wait_ready=True, reconnect=QUICK
    ) as client:
        yield client


def store(client: CacheClient, tokens: list[int]) -> None:
    parent = NAMESPACE.root
    items = [StoreItem(parent, pack_tokens(tokens), 16)]
    [grant] = client.allocate(NAMESPACE.digest, 256, items)
    assert client.commit([(grant.ticket, 0)]) == 1


def test_the_controller_learns_of_workers_and_of_what_they_store(
    worker: CacheClient, controller: RunningController, eventually: Eventually
) -> None:
    store(worker, TOKENS[:4])
    eventually(lambda: controller.found(TOKENS) == 4)
    assert controller.ranks() == [0]
    assert worker.stats().values["agent_registered"] == 1


def test_a_killed_cache_process_is_dropped_and_its_successor_known(
    worker: CacheClient, controller: RunningController, eventually: Eventually
) -> None:
    store(worker, TOKENS[:4])
    eventually(lambda: controller.found(TOKENS) == 4)
    before = worker.incarnation
    os.kill(worker.stats().pid, signal.SIGKILL)
    eventually(lambda: controller.found(TOKENS) == 0)
    eventually(lambda: worker.connected and worker.incarnation != before)
    store(worker, TOKENS[:4])
    eventually(lambda: controller.found(TOKENS) == 4)


def test_only_the_configured_ranks_report(
    configure: Configure, controller: RunningController, eventually: Eventually
) -> None:
    config = configure(
        enable_controller=True,
        controller_url=controller.url,
        lmcache_worker_heartbeat_time=0.1,
        lmcache_worker_ids=(1,),
    )
    ranks = [
        open_client(config, role="worker", rank=rank, world_size=2, namespace=NAMESPACE)
        for rank in range(2)
    ]
    try:
        assert all(client.wait_ready(20) for client in ranks)
        eventually(lambda: controller.ranks() == [1])
    finally:
        for client in ranks:
            client.close()


def test_a_controller_that_is_not_there_holds_up_nobody(connect: Connect) -> None:
    client = connect(enable_controller=True, controller_url="127.0.0.1:1")
    store(client, TOKENS[:4])
    assert client.lookup(NAMESPACE.digest, pack_tokens(TOKENS[:4]), 256).tokens == 4
    assert client.stats().values["agent_registered"] == 0


def test_nothing_heavy_is_imported(script: Script) -> None:
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        assert client.stats().pid == os.getpid()
        print(*sorted({"aiohttp", "nixl", "numpy", "torch", "vllm", "zmq"} & sys.modules.keys()))
    """
    output, _ = script(body, cache_process="embedded").communicate(timeout=20)
    assert output == "\n"


def test_plugins_hear_of_a_cache_that_opens_and_closes(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, CacheInfo]] = []
    monkeypatch.setattr(Plugins, "cache_opened", lambda _, info: heard.append(("opened", info)))
    monkeypatch.setattr(Plugins, "cache_closing", lambda _, info: heard.append(("closing", info)))
    client = connect(cache_process="embedded")
    info = CacheInfo("lmcache_default_instance", client.incarnation or "", ("LocalCPUBackend",))
    assert heard == [("opened", info)]
    client.close()
    assert heard == [("opened", info), ("closing", info)]
