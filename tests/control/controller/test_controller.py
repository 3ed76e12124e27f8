"""The controller's ports: hostile bytes, taken ports, and who may say what."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import msgspec
import pytest
import zmq

from lmcache_kit.controller.controller import Controller
from lmcache_kit.controller.metrics import CONTROLLER
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import ConfigError, DeadlineExceeded, KitError
from lmcache_kit.keys import Namespace
from lmcache_kit.protocol import control as wire
from tests.control.conftest import Running, StartAgent, StartController
from tests.control.fakes import LAYOUT, NAMESPACE, chunks_of
from tests.support.waiting import eventually

PROMPT = list(range(100, 112))

Dial = Callable[[Running], zmq.Socket[bytes]]


@pytest.fixture
def dial() -> Iterator[Dial]:
    """A raw connection to a controller, to say anything on."""
    with ExitStack() as ending:

        def connect(controller: Running) -> zmq.Socket[bytes]:
            context = ending.enter_context(zmq.Context())
            made = ending.enter_context(context.socket(zmq.DEALER))
            made.setsockopt(zmq.LINGER, 0)
            made.setsockopt(zmq.RCVTIMEO, 10_000)
            made.connect(controller.url)
            return made

        yield connect


def register(**changes: object) -> wire.Register:
    fields = {
        "instance_id": "a",
        "incarnation": b"i" * 16,
        "started": 1.0,
        "host": "here",
        "heartbeat_s": 5.0,
        "locations": ("ram",),
        "workers": (wire.WorkerPort(0, 8001),),
        "namespaces": (NAMESPACE,),
    }
    return wire.Register(**{**fields, **changes})  # type: ignore[arg-type]


def hear(connection: zmq.Socket[bytes]) -> wire.FromController:
    return wire.decode_from_controller(connection.recv())


def deep(depth: int) -> bytes:
    return b"\x92\x02\x83\xa4type\xa7goodbye\xa1x" + b"\x91" * depth + b"\xc0"


HOSTILE = {
    "nothing": [b""],
    "one wrong byte": [b"\xc1"],
    "noise": [os.urandom(500)],
    "another version": [msgspec.msgpack.encode((wire.VERSION + 1, {"type": "goodbye"}))],
    "no version": [msgspec.msgpack.encode({"type": "goodbye"})],
    "an unknown tag": [msgspec.msgpack.encode((wire.VERSION, {"type": "evict"}))],
    "a controller's tag": [wire.encode(wire.NotRegistered())],
    "wrong types": [
        msgspec.msgpack.encode((wire.VERSION, {"type": "heartbeat", "positions": "x"}))
    ],
    "an end that is none": [
        msgspec.msgpack.encode(
            (
                wire.VERSION,
                {"type": "operation_ended", "operation_id": "e", "status": {"state": "running"}},
            )
        )
    ],
    "an answer without an event": [
        msgspec.msgpack.encode((wire.VERSION, {"type": "operation_started", "scope": [1]}))
    ],
    "bad utf-8": [b"\x92\x01\x81\xa4type\xa2\xff\xff"],
    "deep nesting": [deep(100_000)],
    "cut off": [wire.encode(register())[:-3]],
    "many frames": [b"x"] * 50,
    "an empty frame before a good one": [b"", wire.encode(register(instance_id="no"))],
    "a pickle": [b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_counted_and_the_next_good_one_works(
    name: str, controller: Running, dial: Dial
) -> None:
    connection = dial(controller)
    connection.send_multipart(HOSTILE[name])
    connection.send(wire.encode(register()))
    assert isinstance(hear(connection), wire.Registered)
    counters = controller.counters()
    assert counters["messages_malformed_total"] == 1
    assert counters["messages_failed_total"] == 0
    assert counters["instances"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"instance_id": ""},
        {"instance_id": "x" * 300},
        {"incarnation": b"short"},
        {"started": float("nan")},
        {"heartbeat_s": float("inf")},
        {"heartbeat_s": -1.0},
        {"locations": ()},
        {"locations": ("ram", "ram")},
        {"locations": tuple("abcdefghij")},
        {"workers": (wire.WorkerPort(0, 1), wire.WorkerPort(0, 2))},
        {"workers": tuple(wire.WorkerPort(rank, 1) for rank in range(2000))},
        {"namespaces": (Namespace("m", LAYOUT, chunk_size=0),)},
        {"namespaces": (Namespace("m", LAYOUT, chunk_size=-4),)},
        {"namespaces": (Namespace("m", LAYOUT, 4, tensor_parallel=-1),)},
        {"namespaces": (Namespace("m" * 9999, LAYOUT, 4),)},
        {"namespaces": tuple(Namespace(str(i), LAYOUT, 4) for i in range(100))},
        {"host": "h" * 999},
    ],
)
def test_a_registration_that_cannot_be_used_is_refused_with_the_reason(
    changes: dict[str, object], controller: Running, dial: Dial
) -> None:
    connection = dial(controller)
    connection.send(wire.encode(register(**changes)))
    answer = hear(connection)
    assert isinstance(answer, wire.Refused)
    assert answer.reason
    connection.send(wire.encode(register()))
    assert isinstance(hear(connection), wire.Registered)
    assert controller.held(PROMPT) == {}


@pytest.mark.parametrize(
    "message",
    [
        wire.Batch("disk", 1, b"", b""),
        wire.Batch("ram", 1, b"x" * 17, b""),
        wire.Batch("ram", 1, b"x" * 16 * (wire.MAX_KEYS_PER_MESSAGE + 1), b""),
        wire.SnapshotPart("ram", 1, 0, True, b"x"),
        wire.Batch("ram", 1, b"k" * 16, b"", (wire.PartialChunkEntry(b"", b"", 1),)),
        wire.Heartbeat((wire.Position("nowhere", 1, 1, 1),)),
    ],
)
def test_a_message_that_makes_no_sense_is_counted_and_the_next_one_works(
    message: wire.FromAgent, controller: Running, dial: Dial
) -> None:
    connection = dial(controller)
    connection.send(wire.encode(register()))
    connection.send(wire.encode(message))
    connection.send(wire.encode(wire.Batch("ram", 1, chunks_of(PROMPT)[0].key, b"")))
    eventually(lambda: controller.held(PROMPT) == {"a": 4})
    assert controller.counters()["messages_malformed_total"] == 1


def test_a_frame_over_the_limit_ends_only_its_own_connection(
    controller: Running, dial: Dial, start_agent: StartAgent
) -> None:
    start_agent(controller.url)[1].store(chunks_of(PROMPT))
    connection = dial(controller)
    connection.send(b"x" * (wire.MAX_FRAME_BYTES + 1))
    eventually(lambda: controller.held(PROMPT) == {"a": 12})
    other = dial(controller)
    other.send(wire.encode(register(instance_id="b")))
    assert isinstance(hear(other), wire.Registered)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /lookup HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00" * 64,
        b"\xff" + b"\x00" * 8 + b"\x7f\x03" + b"\xff" * 200,
        b"\x16\x03\x01\x02\x00\x01\x00",
        os.urandom(4096),
    ],
    ids=["http", "zeros", "greeting", "tls", "noise"],
)
def test_what_does_not_even_speak_zmq_harms_nobody(
    raw: bytes, controller: Running, start_agent: StartAgent
) -> None:
    with socket.create_connection(("127.0.0.1", controller.port)) as stranger:
        stranger.sendall(raw)
        start_agent(controller.url)[1].store(chunks_of(PROMPT))
        eventually(lambda: controller.held(PROMPT) == {"a": 12})
    assert controller.counters()["messages_failed_total"] == 0


def test_a_stranger_is_asked_who_it_is_and_changes_nothing(controller: Running, dial: Dial) -> None:
    connection = dial(controller)
    connection.send(wire.encode(wire.Batch("ram", 1, chunks_of(PROMPT)[0].key, b"")))
    assert hear(connection) == wire.NotRegistered()
    assert controller.counters()["index_keys"] == 0


def test_nobody_speaks_for_another_connection(controller: Running, dial: Dial) -> None:
    mine, theirs = dial(controller), dial(controller)
    mine.send(wire.encode(register(instance_id="mine")))
    theirs.send(wire.encode(register(instance_id="theirs")))
    assert isinstance(hear(mine), wire.Registered)
    assert isinstance(hear(theirs), wire.Registered)
    theirs.send(wire.encode(wire.Batch("ram", 1, chunks_of(PROMPT)[0].key, b"")))
    theirs.send(wire.encode(wire.Goodbye()))
    eventually(lambda: controller.counters()["goodbyes_total"] == 1)
    assert controller.held(PROMPT) == {}
    (worker,) = controller.call(controller.controller.instances.workers)
    assert worker.instance_id == "mine"


def test_only_the_one_who_was_asked_may_answer(
    start_controller: StartController, dial: Dial
) -> None:
    controller = start_controller(health_timeout_s=1.0)
    asked, liar = dial(controller), dial(controller)
    for name, connection in (("asked", asked), ("liar", liar)):
        connection.send(wire.encode(register(instance_id=name)))
        hear(connection)
    waiting = controller.begin(controller.controller.instances.health("asked"))
    command = hear(asked)
    assert isinstance(command, wire.Command)
    liar.send(wire.encode(wire.Result(command.correlation)))
    with pytest.raises(DeadlineExceeded):
        waiting.result(10)
    asked.send(wire.encode(wire.Result(command.correlation)))
    eventually(lambda: controller.counters()["results_unasked_total"] == 2)
    assert controller.counters()["commands_waiting"] == 0


def test_a_worker_that_reports_an_error_is_not_well(controller: Running, dial: Dial) -> None:
    connection = dial(controller)
    connection.send(wire.encode(register()))
    hear(connection)
    asked = controller.begin(controller.controller.instances.health("a"))
    command = hear(connection)
    assert isinstance(command, wire.Command)
    connection.send(wire.encode(wire.Result(command.correlation, "no memory")))
    assert asked.result(10) == {0: 1}


def test_a_flood_of_rubbish_leaves_room_for_others(
    controller: Running, dial: Dial, start_agent: StartAgent
) -> None:
    connection = dial(controller)
    connection.setsockopt(zmq.SNDTIMEO, 20)
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            with contextlib.suppress(zmq.Again):
                connection.send(b"rubbish")

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        eventually(lambda: controller.counters()["messages_malformed_total"] > 5000)
        start_agent(controller.url)[1].store(chunks_of(PROMPT))
        eventually(lambda: controller.held(PROMPT) == {"a": 12})
    finally:
        over.set()
        thread.join()


async def test_messages_that_never_stop_leave_turns_for_others() -> None:
    class Endless:
        left = 20_000

        async def recv_multipart(self, copy: bool) -> list[zmq.Frame]:
            self.left -= 1
            if not self.left:
                raise asyncio.CancelledError
            return [zmq.Frame(b"peer"), zmq.Frame(b"rubbish")]

    endless = Endless()
    serving = asyncio.create_task(Controller("localhost", [])._serve(0, endless))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert endless.left > 0
    with pytest.raises(asyncio.CancelledError):
        await serving


def test_a_message_that_breaks_the_controller_is_dropped_and_the_next_one_works(
    controller: Running, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = controller.registry
    with monkeypatch.context() as broken:
        broken.setattr(registry, "handle", lambda *_: 1 / 0)
        connection = dial(controller)
        connection.send(wire.encode(register()))
        eventually(lambda: controller.counters()["messages_failed_total"] == 1)
    connection.send(wire.encode(register()))
    assert isinstance(hear(connection), wire.Registered)


def test_a_taken_port_is_named_with_the_flag_to_change_it(
    start_controller: StartController,
) -> None:
    first = start_controller()
    with pytest.raises(
        ConfigError,
        match=rf"port {first.port} on localhost is taken\. Choose another with --monitor-port",
    ):
        start_controller(first.port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.77"])
async def test_an_impossible_host_is_named_with_the_flag_to_change_it(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"{host}.*--host") as info:
        await Controller(host, [0]).start()
    assert isinstance(info.value, KitError)


async def test_localhost_is_bound_as_loopback_and_every_port_is_served() -> None:
    controller = Controller("localhost", [0])
    assert controller.endpoints == ()
    await controller.start()
    assert controller.endpoints[0].startswith("tcp://127.0.0.1:")
    await controller.stop()
    await controller.stop()
    assert controller.endpoints == ()


async def test_both_monitor_ports_speak_the_same_wire() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = [each.getsockname()[1] for each in (one, two)]
    controller = Controller("127.0.0.1", ports)
    await controller.start()
    try:
        for at, url in enumerate(controller.endpoints):
            with zmq.Context() as context, context.socket(zmq.DEALER) as connection:
                connection.setsockopt(zmq.LINGER, 0)
                connection.connect(url)
                connection.send(wire.encode(register(instance_id=f"i{at}")))
                while len(controller.instances.workers()) <= at:
                    await asyncio.sleep(0.01)
    finally:
        await controller.stop()
    assert [worker.instance_id for worker in controller.instances.workers()] == ["i0", "i1"]


def test_workers_are_told_with_the_address_they_came_from(
    start_controller: StartController, start_agent: StartAgent
) -> None:
    controller = start_controller(registry=Registry(wall=lambda: 1e9))
    start_agent(controller.url, "a", host="box", ranks=(1, 0), worker_ports=(8001, 8002))
    eventually(lambda: controller.counters()["workers"] == 2)
    zero, one = controller.call(controller.controller.instances.workers, "a")
    assert (zero.worker_id, zero.port, zero.ip) == (0, 8001, "127.0.0.1")
    assert (one.worker_id, one.port, one.alive) == (1, 8002, True)
    assert (zero.registration_time, zero.last_heartbeat_time) == (1e9, 1e9)
    assert controller.call(controller.controller.instances.workers, "a", [1]) == [one]


def test_every_counter_is_there_from_the_start(controller: Running) -> None:
    counters = controller.counters()
    assert counters.keys() == CONTROLLER.by_name.keys()
    assert set(counters.values()) == {0.0}
