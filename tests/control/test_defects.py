"""What went wrong in another control plane for KV caches, each as a test on ours."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import msgspec
import pytest
import zmq

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import DeadlineExceeded, NoWorker, UnknownName
from lmcache_kit.interfaces.frontend import LookupQuery
from lmcache_kit.keys import chain, pack_tokens
from lmcache_kit.protocol import control as wire
from tests.control.cache_process import TOKENS
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import NAMESPACE, chunks_of
from tests.control.pair import Pair
from tests.support.processes import freeze
from tests.support.proxies import Proxy
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
PROMPT = list(range(100, 112))
StartProcess: TypeAlias = Callable[[Running, str], subprocess.Popen[bytes]]


@pytest.fixture
def start_process() -> Iterator[StartProcess]:
    """Start agents in processes of their own, and kill these at the end."""
    with ExitStack() as ending:

        def start(controller: Running, instance_id: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, str(ROOT / "tests/control/cache_process.py")]
            process = subprocess.Popen(
                [*command, controller.url, instance_id],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            ending.callback(process.wait)
            ending.callback(process.kill)
            eventually(lambda: controller.held(TOKENS).get(instance_id) == len(TOKENS))
            return process

        yield start


def test_1a_a_chunk_behind_a_gap_is_not_credited(
    controller: Running, start_agent: StartAgent
) -> None:
    first, second, _ = chunks_of(PROMPT)
    _, a = start_agent(controller.url, "a")
    _, b = start_agent(controller.url, "b")
    a.store([first])
    b.store([second])
    eventually(lambda: controller.counters()["index_keys"] == 2)
    assert controller.held(PROMPT) == {"a": 4}


def test_1b_replicas_do_not_hide_each_other(controller: Running, start_agent: StartAgent) -> None:
    chunks = chunks_of(PROMPT)
    for name, count in (("a", 3), ("b", 3), ("c", 1)):
        start_agent(controller.url, name)[1].store(chunks[:count])
    eventually(lambda: len(controller.held(PROMPT)) == 3)
    eventually(lambda: controller.held(PROMPT) == {"a": 12, "b": 12, "c": 4})
    answer = controller.call(controller.controller.instances.lookup, LookupQuery(PROMPT))
    assert [each.instance_id for each in answer.instances] == ["a", "b", "c"]
    assert [each.best.stopped for each in answer.instances] == ["end", "end", "elsewhere"]


def test_1c_a_chunk_counts_only_when_every_rank_has_stored_it(
    controller: Running, start_agent: StartAgent, make_engine: Callable[[], CacheEngine]
) -> None:
    engine = make_engine()
    start_agent(controller.url, "a", engine=engine, ranks=(0, 1))
    chunk = next(chain(NAMESPACE.digest, pack_tokens(PROMPT), 4))
    item = StoreItem(chunk.parent, pack_tokens(PROMPT[:4]), 64)

    def store(rank: int) -> None:
        (grant,) = engine.allocate(NAMESPACE.digest, rank, 2, 4, [item], "test")
        engine.commit([(grant.ticket, 1)], "test")

    store(0)
    # Several heartbeats later there is still nothing.
    eventually(lambda: controller.counters().get("messages_total", 0) > 4)
    assert controller.held(PROMPT) == {}
    store(1)
    eventually(lambda: controller.held(PROMPT) == {"a": 4})


@pytest.fixture
def make_engine() -> Iterator[Callable[[], CacheEngine]]:
    """A real engine over a little real memory."""
    from lmcache_kit_cpu_backend.backend import LocalCPUBackend

    with ExitStack() as ending:

        def make() -> CacheEngine:
            backend = LocalCPUBackend(capacity_bytes=1 << 20)
            engine = CacheEngine(backend, LRU(), location="LocalCPUBackend")
            ending.callback(engine.close)
            return engine

        yield make


def test_1d_a_prefix_split_over_two_locations_is_reported_for_each_alone(
    controller: Running,
) -> None:
    """Two locations of one process, spoken by hand: our agent has one location so far."""
    first, second, _ = chunks_of(PROMPT)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(controller.url)
        register = wire.Register(
            "a", b"i" * 16, 1.0, "here", 5.0, ("ram", "disk"), (), (NAMESPACE,)
        )
        socket.send(wire.encode(register))
        socket.send(wire.encode(wire.Batch("disk", 1, first.key, b"")))
        socket.send(wire.encode(wire.Batch("ram", 1, second.key, b"")))
        eventually(lambda: controller.counters()["index_keys"] == 2)
        answer = controller.call(controller.controller.instances.lookup, LookupQuery(PROMPT))
        (instance,) = answer.instances
        (found,) = instance.locations
        assert (found.location, found.tokens, found.stopped) == ("disk", 4, "elsewhere")


def test_2_a_malformed_frame_is_dropped_and_the_next_valid_one_works(
    controller: Running, start_agent: StartAgent
) -> None:
    with (
        zmq.Context() as context,
        context.socket(zmq.PUSH) as push,
        context.socket(zmq.DEALER) as dealer,
    ):
        for socket in (push, dealer):
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(controller.url)
        dealer.send(b"\xc1")
        eventually(lambda: controller.counters().get("messages_malformed_total") == 1)
    start_agent(controller.url)[1].store(chunks_of(PROMPT))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})


def test_3_a_stopped_worker_costs_one_deadline_and_the_next_request_works(
    start_process: StartProcess, start_controller: StartController
) -> None:
    controller = start_controller(health_timeout_s=0.5)
    stuck = start_process(controller, "stuck")
    start_process(controller, "well")
    freeze(stuck.pid)
    with pytest.raises(DeadlineExceeded, match=r"'stuck' did not answer 'ping' within 0\.5 s"):
        controller.run(controller.controller.instances.health("stuck"))
    assert controller.run(controller.controller.instances.health("well")) == {0: 0}
    eventually(lambda: "stuck" not in controller.held(TOKENS))
    with pytest.raises(NoWorker, match="'stuck' has not been heard of for"):
        controller.run(controller.controller.instances.health("stuck"))
    stuck.send_signal(signal.SIGCONT)
    eventually(lambda: "stuck" in controller.held(TOKENS))
    assert controller.run(controller.controller.instances.health("stuck")) == {0: 0}


def test_3_stop_does_not_wait_for_a_dead_worker(
    start_process: StartProcess, start_controller: StartController
) -> None:
    controller = start_controller(health_timeout_s=3600.0)
    freeze(start_process(controller, "stuck").pid)

    async def stop_meanwhile() -> None:
        asked = controller.loop.create_task(controller.controller.instances.health("stuck"))
        while not controller.controller.counters()["commands_waiting"]:
            await asyncio.sleep(0.01)
        await controller.controller.stop()
        with pytest.raises(NoWorker, match="the controller is stopping"):
            await asked

    controller.run(stop_meanwhile())


def test_4_a_killed_worker_is_hidden_and_later_dropped(
    start_process: StartProcess, start_controller: StartController
) -> None:
    controller = start_controller(registry=Registry(drop_after_s=1.0))
    process = start_process(controller, "a")
    process.kill()
    eventually(lambda: controller.held(TOKENS) == {})
    eventually(lambda: controller.call(controller.controller.instances.workers) == [])
    eventually(lambda: controller.counters()["index_keys"] == 0)
    eventually(lambda: controller.counters()["index_holders_unswept"] == 0)


def test_4_a_worker_that_comes_back_on_another_connection_keeps_its_keys(
    controller: Running, start_agent: StartAgent
) -> None:
    with Proxy(controller.port) as proxy:
        _, engine = start_agent(proxy.address)
        engine.store(chunks_of(PROMPT[:8]))
        eventually(lambda: controller.held(PROMPT) == {"a": 8})
        proxy.cut()
        engine.store(chunks_of(PROMPT))
        eventually(lambda: controller.held(PROMPT) == {"a": 12})
        counters = controller.counters()
    assert counters["reconnections_total"] == 1
    assert (counters["registrations_total"], counters["index_holders"]) == (1, 1)
    assert engine.snapshots == 0


def test_4_a_gap_is_healed() -> None:
    pair = Pair()
    pair.exchange()
    pair.exchange()
    pair.tier.store(chunks_of(PROMPT[:4]))
    pair.clock.now += 1
    pair.exchange(lost=wire.Batch)
    assert len(pair.registry.index) == 0
    for _ in range(4):
        pair.clock.now += 1
        pair.exchange()
    assert len(pair.registry.index) == 1
    assert pair.registry.counts["resyncs_total"] == 1
    assert pair.tier.snapshots == 0


def test_4_a_restarted_controller_is_filled_again(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    first = start_controller()
    _, engine = start_agent(first.url)
    engine.store(chunks_of(PROMPT))
    eventually(lambda: first.held(PROMPT) == {"a": 12})
    first.close()
    engine.evict([chunks_of(PROMPT)[-1].key])
    second = start_controller(first.port)
    eventually(lambda: second.held(PROMPT) == {"a": 8})


def test_5_every_chunk_size_and_model_is_found_at_once(
    controller: Running, start_agent: StartAgent
) -> None:
    other = msgspec.structs.replace(NAMESPACE, model="other/model", chunk_size=3)
    _, a = start_agent(controller.url, "a")
    _, b = start_agent(controller.url, "b", namespaces=(other,))
    a.store(chunks_of(PROMPT))
    b.store(chunks_of(PROMPT[:7], other))
    eventually(lambda: controller.held(PROMPT) == {"a": 12, "b": 7})
    assert controller.held(PROMPT, model="other/model") == {"b": 7}
    with pytest.raises(UnknownName, match="third/model"):
        controller.held(PROMPT, model="third/model")
    assert controller.held(PROMPT, cache_salt="tenant") == {}


def test_5_processes_with_different_hash_seeds_find_each_other(
    controller: Running,
    start_process: StartProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in ("0", "123"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        start_process(controller, f"seed {seed}")
    assert controller.held(TOKENS) == {"seed 0": 12, "seed 123": 12}


def test_6_an_unknown_instance_is_an_error_that_lists_the_known_ones(
    controller: Running, start_agent: StartAgent
) -> None:
    for name in ("b", "a"):
        start_agent(controller.url, name)
    eventually(lambda: controller.counters()["instances"] == 2)
    told = r"unknown instance 'x'\. Known: a, b"
    with pytest.raises(UnknownName, match=told):
        controller.run(controller.controller.instances.health("x"))
    with pytest.raises(UnknownName, match=told):
        controller.call(controller.controller.instances.workers, "x")
    with pytest.raises(UnknownName, match=told):
        controller.held(PROMPT, instance_id="x")
    with pytest.raises(UnknownName, match=r"unknown worker '7'\. Known: 0"):
        controller.call(controller.controller.instances.workers, "a", [0, 7])
