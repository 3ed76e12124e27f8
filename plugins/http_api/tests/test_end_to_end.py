"""REST, the real controller and a real cache that reports to it over ZMQ."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import aiohttp
import pytest
import zmq
import zmq.asyncio
from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions

from lmcache_kit.agent.agent import Agent
from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.controller.controller import Controller
from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.protocol import control as wire

backend = pytest.importorskip("lmcache_kit_cpu_backend.backend")

INSTANCE = "lmcache_default_instance"
INCARNATION = bytes(15) + b"\x01"
LLAMA = Namespace("meta-llama/Llama-3.1-8B-Instruct", KVLayout("bfloat16", 32, 8, 128), 256)
SEED_TOKENS = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
SEED_BODY = (
    b'{\n    "tokens": [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]\n  }'
)
WAIT_S = 20


class Rest(NamedTuple):
    """The frontend of a running controller, and where cache processes reach the latter."""

    session: aiohttp.ClientSession
    monitor: str

    async def post(self, path: str, body: dict[str, object]) -> tuple[int, dict]:
        async with self.session.post(path, json=body) as response:
            return response.status, await response.json()

    async def lookup(self, tokens: list[int]) -> dict[str, object]:
        status, reply = await self.post("/lookup", {"tokens": tokens})
        assert status == 200
        return reply["layout_info"]

    async def until(self, tokens: list[int], expected: dict[str, object]) -> None:
        """Wait until a lookup answers this."""
        end = time.monotonic() + WAIT_S
        while (found := await self.lookup(tokens)) != expected:
            assert time.monotonic() < end, found
            await asyncio.sleep(0.02)


@pytest.fixture
async def rest() -> AsyncIterator[Rest]:
    controller = Controller("localhost", [0], health_timeout_s=0.2)
    await controller.start()
    frontend = HttpFrontend(controller, HttpOptions(port=0))
    await frontend.start()
    async with aiohttp.ClientSession(frontend.endpoints[0]) as session:
        yield Rest(session, controller.endpoints[0])
    await frontend.stop()
    await controller.stop()


@pytest.fixture
async def engine(rest: Rest) -> AsyncIterator[CacheEngine]:
    """A cache whose agent has been started, with one worker."""
    engine = CacheEngine(backend.LocalCPUBackend(1 << 20), LRU(), location="LocalCPUBackend")
    agent = Agent(
        [engine.memory_tier],
        url=rest.monitor.removeprefix("tcp://"),
        instance_id=INSTANCE,
        incarnation=INCARNATION,
        host="127.0.0.1",
        heartbeat_s=0.2,
        worker_ports=[8001],
    )
    agent.register_worker(0)
    agent.register_namespace(LLAMA)
    agent.start()
    yield engine
    await asyncio.to_thread(agent.stop)
    engine.close()


def store(engine: CacheEngine, tokens: list[int]) -> None:
    space = LLAMA.digest
    item = StoreItem(LLAMA.root, pack_tokens(tokens), 64)
    [grant] = engine.allocate(space, 0, 1, LLAMA.chunk_size, [item], "test")
    assert engine.commit([(grant.ticket, 0)], "test") == 1


async def test_the_documented_lookup_of_a_stored_prompt_has_the_documented_reply(rest, engine):
    store(engine, SEED_TOKENS)
    await rest.until(SEED_TOKENS, {INSTANCE: ["LocalCPUBackend", 12]})
    headers = {"Content-Type": "application/json"}
    async with rest.session.post("/lookup", data=SEED_BODY, headers=headers) as response:
        reply = await response.json()
    assert isinstance(reply.pop("event_id"), str)
    assert reply == {
        INSTANCE: ["LocalCPUBackend", 12],
        "layout_info": {INSTANCE: ["LocalCPUBackend", 12]},
    }


async def test_what_leaves_the_cache_is_found_no_more(rest, engine):
    store(engine, SEED_TOKENS)
    await rest.until(SEED_TOKENS, {INSTANCE: ["LocalCPUBackend", 12]})
    gone, _ = engine.memory_tier.clear()
    assert gone.chunks == 1
    await rest.until(SEED_TOKENS, {})


async def test_the_worker_is_well_listed_and_found_by_its_address(rest, engine):
    store(engine, SEED_TOKENS)
    await rest.until(SEED_TOKENS, {INSTANCE: ["LocalCPUBackend", 12]})
    status, reply = await rest.post("/health", {"instance_id": INSTANCE})
    assert (status, reply["error_codes"]) == (200, {"0": 0})
    _, reply = await rest.post("/query_worker_info", {"instance_id": "all"})
    [info] = reply["worker_infos"]
    assert (info["instance_id"], info["worker_id"]) == (INSTANCE, 0)
    assert (info["ip"], info["port"], info["alive"]) == ("127.0.0.1", 8001, True)
    _, reply = await rest.post("/query_instance", {"event_id": "e", "ip": "127.0.0.1"})
    assert reply == {"event_id": "e", "res": INSTANCE, "instances": [INSTANCE]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/health", {"instance_id": "nobody"}),
        ("/query_worker_info", {"instance_id": "nobody"}),
        ("/lookup", {"tokens": [1], "instance_id": "nobody"}),
    ],
)
async def test_an_unknown_instance_is_404_and_lists_the_known_one(rest, engine, path, body):
    store(engine, SEED_TOKENS)
    await rest.until(SEED_TOKENS, {INSTANCE: ["LocalCPUBackend", 12]})
    status, reply = await rest.post(path, body)
    assert (status, reply["error"]["code"]) == (404, "unknown_instance")
    assert reply["error"]["hint"] == f"Known: {INSTANCE}"


async def test_an_unknown_worker_is_404_and_lists_the_known_one(rest, engine):
    store(engine, SEED_TOKENS)
    await rest.until(SEED_TOKENS, {INSTANCE: ["LocalCPUBackend", 12]})
    status, reply = await rest.post(
        "/query_worker_info", {"instance_id": INSTANCE, "worker_ids": [0, 7]}
    )
    assert (status, reply["error"]["code"]) == (404, "unknown_worker")
    assert reply["error"]["hint"] == "Known: 0"


async def test_a_worker_that_does_not_answer_is_504_and_one_that_is_silent_503(rest):
    """Registers and heartbeats by hand, and never answers a command."""
    register = wire.Register(
        instance_id="mute",
        incarnation=INCARNATION,
        started=time.time(),
        host="127.0.0.1",
        heartbeat_s=0.5,
        locations=("LocalCPUBackend",),
        workers=(wire.WorkerPort(0, 8001),),
        namespaces=(LLAMA,),
    )
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as mute:
        mute.linger = 0
        mute.connect(rest.monitor)
        await mute.send(wire.encode(register))
        assert isinstance(wire.decode_from_controller(await mute.recv()), wire.Registered)
        for _ in range(2):
            status, reply = await rest.post("/health", {"instance_id": "mute"})
            assert (status, reply["error"]["code"]) == (504, "deadline_exceeded")
            assert "'mute'" in reply["error"]["message"]
        end = time.monotonic() + WAIT_S
        while status == 504 and time.monotonic() < end:
            status, reply = await rest.post("/health", {"instance_id": "mute"})
        assert (status, reply["error"]["code"]) == (503, "no_worker")


async def test_the_controllers_counters_are_among_the_metrics(rest):
    await rest.lookup([1])
    async with rest.session.get("/metrics") as response:
        assert "\nlmcache_kit_controller_lookups_total 1.0\n" in await response.text()
