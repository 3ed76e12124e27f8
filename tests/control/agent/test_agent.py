"""The agent's thread against real controllers: whatever comes and goes, the index comes right."""

from __future__ import annotations

import logging
import os
import socket
import threading

import msgspec
import pytest
import zmq

from lmcache_kit.agent import controller_client, event_log
from lmcache_kit.agent.agent import Agent
from lmcache_kit.agent.controller_client import ControllerClient, Send
from lmcache_kit.cache.records import StoredChunk
from lmcache_kit.errors import ConfigError
from lmcache_kit.interfaces.frontend import LookupQuery
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol.address import connect_url
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import LAYOUT, LOCATION, NAMESPACE, FakeTier, chunks_of
from tests.support.proxies import Listener, Proxy
from tests.support.waiting import eventually

PROMPT = list(range(100, 112))


def many_chunks(count: int, seed: int = 0) -> list[StoredChunk]:
    return chunks_of([seed, *range(4 * count - 1)])


def test_a_controller_that_starts_later_learns_everything(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    first = start_controller()
    first.close()
    agent, engine = start_agent(f"localhost:{first.port}")
    engine.store(chunks_of(PROMPT))
    assert agent.stats()["registered"] == 0
    later = start_controller(first.port)
    eventually(lambda: later.held(PROMPT) == {"a": 12})


def test_what_lay_there_before_the_agent_is_announced(
    controller: Running, start_agent: StartAgent
) -> None:
    engine = FakeTier()
    engine.store(chunks_of(PROMPT))
    start_agent(controller.url, engine=engine)
    eventually(lambda: controller.held(PROMPT) == {"a": 12})


def test_a_cut_connection_is_healed_by_replay_in_whatever_state_it_was(
    controller: Running, start_agent: StartAgent
) -> None:
    with Proxy(controller.port) as proxy:
        _, engine = start_agent(proxy.address)
        for round_ in range(4):
            some = many_chunks(5, seed=round_)
            engine.store(some)
            proxy.cut()
            engine.evict([chunk.key for chunk in some[2:]])
            eventually(lambda: controller.counters()["index_keys"] == 2 * (round_ + 1))  # noqa: B023
    assert engine.snapshots == 0


def test_a_controller_that_moves_is_found_again(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    first, second = start_controller(), start_controller()
    with Proxy(first.port) as proxy:
        _, engine = start_agent(proxy.address)
        engine.store(chunks_of(PROMPT))
        eventually(lambda: first.held(PROMPT) == {"a": 12})
        proxy.lead_to(second.port)
        proxy.cut()
        eventually(lambda: second.held(PROMPT) == {"a": 12})
        eventually(lambda: first.held(PROMPT) == {})


def test_each_location_is_announced_and_found_by_itself(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    below = [FakeTier("disk"), FakeTier("server")]
    controller = start_controller()
    agent, memory = start_agent(controller.url, below=below)
    memory.store(chunks_of(PROMPT)[:1])
    below[0].store(chunks_of(PROMPT))

    def held() -> dict[str, int]:
        answer = controller.call(
            lambda: controller.controller.instances.lookup(LookupQuery(PROMPT))
        )
        return {at.location: at.tokens for each in answer.instances for at in each.locations}

    eventually(lambda: held() == {"disk": 12, memory.location: 4})
    below[0].evict([chunks_of(PROMPT)[2].key])
    assert agent.confirm("disk", 30)
    assert held() == {"disk": 8, memory.location: 4}
    below[1].store(chunks_of(PROMPT))
    assert agent.confirm("server", 30)
    assert held() == {"server": 12, "disk": 8, memory.location: 4}


def test_of_equally_long_matches_that_of_the_higher_tier_is_the_answer(
    controller: Running, start_agent: StartAgent
) -> None:
    agent, memory = start_agent(controller.url, below=[below := FakeTier("A")])
    for engine in (below, memory):
        engine.store(chunks_of(PROMPT))
        assert agent.confirm(engine.location, 30)
    answer = controller.call(controller.controller.instances.lookup, LookupQuery(PROMPT))
    assert answer.instances[0].best.location == memory.location


def test_a_controller_that_restarts_learns_every_location_again(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    first, second = start_controller(), start_controller()
    with Proxy(first.port) as proxy:
        disk = FakeTier("disk")
        agent, memory = start_agent(proxy.address, below=[disk])
        memory.store(chunks_of(PROMPT))
        disk.store(chunks_of(PROMPT))
        eventually(lambda: first.counters()["index_keys"] == 3)
        proxy.lead_to(second.port)
        proxy.cut()
        eventually(lambda: second.counters()["index_keys"] == 3)
        assert agent.confirm("disk", 30)
        assert agent.confirm(memory.location, 30)


def test_a_large_cache_comes_over_in_parts_while_it_changes(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    engine = FakeTier()
    lying = many_chunks(event_log.KEYS_PER_MESSAGE * 5)
    engine.store(lying)
    controller = start_controller()
    start_agent(controller.url, engine=engine)
    for number in range(200):
        engine.store(chunks_of([number, 7, 7, 7]))
        engine.evict([lying[number].key])
    eventually(lambda: controller.counters()["index_keys"] == len(engine.chunks), timeout_s=30)
    process = controller.call(controller.registry.find, "a")
    holder = process.replicas[engine.location].holder
    keys = controller.call(lambda: set(controller.registry.index.keys_of(holder)))
    assert keys == engine.chunks.keys()


def test_an_index_that_differs_is_noticed_by_its_digest_and_replaced(
    controller: Running, start_agent: StartAgent
) -> None:
    _, engine = start_agent(controller.url)
    engine.store(chunks_of(PROMPT))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})

    def spoil() -> None:
        registry = controller.registry
        replica = registry.find("a").replicas[engine.location]
        registry.index.remove(replica.holder, [chunks_of(PROMPT)[0].key])

    controller.call(spoil)
    assert controller.held(PROMPT) == {}
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    assert controller.counters()["digest_mismatches_total"] >= 1
    assert engine.snapshots == 1


def test_more_changes_than_are_kept_are_healed_by_a_snapshot(
    controller: Running, start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, engine = start_agent(controller.url, max_pending=50)
    eventually(lambda: agent.stats()["registered"])
    with engine.lock:
        engine.store(many_chunks(5000))
    eventually(lambda: controller.counters()["index_keys"] == 5000)
    assert agent.stats()["dropped_changes_total"] > 0


def test_the_engine_never_waits_for_a_controller_that_takes_nothing(
    start_agent: StartAgent, caplog: pytest.LogCaptureFixture
) -> None:
    """A port that accepts and never reads."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.setsockopt(zmq.RCVHWM, 1)
        port = deaf.bind_to_random_port("tcp://127.0.0.1")
        agent, engine = start_agent(f"localhost:{port}")
        eventually(lambda: agent.stats().get("messages_sent_total", 0) >= 1)
        for number in range(20):
            engine.store(many_chunks(1000, seed=number))
        agent.stop()
    assert "did not end in time" not in caplog.text


def test_an_idle_agent_wakes_for_heartbeats_only(
    controller: Running, start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    take_turn = ControllerClient.turn

    def counted(self: ControllerClient, send: Send) -> None:
        nonlocal turns
        turns += 1
        take_turn(self, send)

    monkeypatch.setattr(ControllerClient, "turn", counted)
    agent, engine = start_agent(controller.url)
    engine.store(chunks_of(PROMPT))
    assert agent.confirm(LOCATION, 30)
    sent, turns = agent.stats()["messages_sent_total"], 0
    eventually(lambda: agent.stats()["messages_sent_total"] >= sent + 5)
    assert turns <= 15


def test_workers_and_namespaces_that_come_later_are_told(
    controller: Running, start_agent: StartAgent
) -> None:
    agent, engine = start_agent(controller.url, ranks=(), namespaces=())
    engine.store(chunks_of(PROMPT))
    eventually(lambda: controller.counters()["index_keys"] == 3)
    assert controller.call(controller.controller.instances.workers) == []
    assert controller.held(PROMPT) == {}
    agent.register_worker(1)
    agent.register_namespace(NAMESPACE)
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    assert [
        each.worker_id for each in controller.call(controller.controller.instances.workers)
    ] == [1]
    assert engine.snapshots == 0


def test_a_cache_that_outlives_many_models_is_found_by_the_last_ones(
    controller: Running, start_agent: StartAgent
) -> None:
    agent, engine = start_agent(controller.url, namespaces=())
    for number in range(100):
        agent.register_namespace(Namespace(f"model{number}", LAYOUT, 4))
    last = Namespace("model99", LAYOUT, 4)
    engine.store(chunks_of(PROMPT, last))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    assert controller.counters()["namespaces"] == 64


def test_what_a_namespace_replaces_is_not_found_any_more(
    controller: Running, start_agent: StartAgent
) -> None:
    agent, engine = start_agent(controller.url)
    engine.store(chunks_of(PROMPT))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    agent.register_namespace(msgspec.structs.replace(NAMESPACE, generation="g"), [NAMESPACE])
    eventually(lambda: controller.held(PROMPT) == {})
    (worker,) = controller.call(controller.controller.instances.workers)
    assert [(each.model, each.generation) for each in worker.models] == [(NAMESPACE.model, "g")]


def test_goodbye_hides_at_once(controller: Running, start_agent: StartAgent) -> None:
    agent, engine = start_agent(controller.url, heartbeat_s=60.0)
    engine.store(chunks_of(PROMPT))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    agent.stop()
    eventually(lambda: controller.held(PROMPT) == {})
    assert engine.listeners == []


def test_two_processes_of_one_name_the_later_one_counts_and_the_other_is_warned_once(
    controller: Running, start_agent: StartAgent, caplog: pytest.LogCaptureFixture
) -> None:
    early, engine = start_agent(controller.url, started=1.0, heartbeat_s=0.05)
    engine.store(chunks_of(PROMPT))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    with caplog.at_level(logging.WARNING):
        late, other = start_agent(controller.url, started=2.0)
        other.store(chunks_of(PROMPT[:4]))
        eventually(lambda: controller.held(PROMPT) == {"a": 4})
        eventually(lambda: early.stats()["rejected_total"] >= 3)
    assert (early.stats()["registered"], late.stats()["registered"]) == (0, 1)
    (warning,) = caplog.records
    assert "instance 'a'" in warning.message
    assert "127.0.0.1 that started later" in warning.message
    assert "lmcache_instance_id" in warning.message
    late.stop()
    eventually(lambda: controller.held(PROMPT) == {"a": 12})


def test_a_refused_agent_says_why_and_goes_on_asking(
    controller: Running, start_agent: StartAgent, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = Namespace("some/model", LAYOUT, chunk_size=0)
    with caplog.at_level(logging.WARNING):
        agent, _ = start_agent(controller.url, heartbeat_s=0.05, namespaces=(wrong,))
        eventually(lambda: agent.stats().get("rejected_total", 0) >= 2)
    (warning,) = caplog.records
    assert "the controller refuses: a namespace cannot be used" in warning.message


def test_rubbish_from_the_controllers_port_is_counted_and_survived(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as liar:
        liar.setsockopt(zmq.LINGER, 0)
        port = liar.bind_to_random_port("tcp://127.0.0.1")
        agent, engine = start_agent(f"localhost:{port}")
        identity, _ = liar.recv_multipart()
        for rubbish in (b"", b"\xc1", os.urandom(100)):
            liar.send_multipart([identity, rubbish])
        eventually(lambda: agent.stats().get("messages_malformed_total") == 3)
    engine.store(chunks_of(PROMPT))
    honest = start_controller(port)
    eventually(lambda: honest.held(PROMPT) == {"a": 12})


def test_an_engine_that_fails_does_not_end_the_agent(
    controller: Running,
    start_agent: StartAgent,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = FakeTier()
    engine.store(chunks_of(PROMPT))
    failed = threading.Event()
    snapshot = engine.snapshot

    def fail_once(receive: object) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("broken once")
        snapshot(receive)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "snapshot", fail_once)
    agent, _ = start_agent(controller.url, engine=engine)
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    assert agent.stats()["failures_total"] == 1
    assert "starts over" in caplog.text


def test_an_agent_that_never_started_stops() -> None:
    Agent([FakeTier()], url="localhost:1", instance_id="a", incarnation=b"i" * 16).stop()


@pytest.mark.parametrize(
    "wrong", ["", "localhost", "localhost:port", "http://x:1", ":9", "x:99999"]
)
def test_an_address_that_cannot_be_one_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"controller_url .* is not an address"):
        connect_url(wrong)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("localhost:9001", "tcp://localhost:9001"),
        ("tcp://box:1", "tcp://box:1"),
        ("0.0.0.0:9001", "tcp://127.0.0.1:9001"),
        ("[::1]:9001", "tcp://[::1]:9001"),
    ],
)
def test_addresses_are_read_as_people_write_them(written: str, meant: str) -> None:
    assert connect_url(written) == meant


def test_what_is_no_controller_is_warned_of_with_its_address(
    start_agent: StartAgent, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of another protocol, which answers in its own way."""
    monkeypatch.setattr(controller_client, "WARN_S", 0.2)
    asked = 0

    def serve(connection: socket.socket) -> None:
        nonlocal asked
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        asked += 1

    with Listener(serve) as other, caplog.at_level(logging.WARNING):
        agent, _ = start_agent(other.address)
        eventually(lambda: caplog.records)
        before = asked
        eventually(lambda: asked > before + 2)
        agent.stop()
    [warning] = [record.getMessage() for record in caplog.records]
    assert f"no controller answers at {other.address}" in warning
