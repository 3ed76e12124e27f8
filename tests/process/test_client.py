"""The client against servers that misbehave, and under several threads."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.cache.records import Grant, StoreItem
from lmcache_kit.errors import (
    CacheStartFailed,
    CacheTimeout,
    CacheUnavailable,
    ConfigError,
    KitError,
)
from lmcache_kit.keys import chunk_key, pack_tokens
from lmcache_kit.process.channel import Channel
from lmcache_kit.process.client import CacheClient, Reconnect
from lmcache_kit.protocol import framing
from lmcache_kit.protocol import local as protocol
from lmcache_kit.protocol.local import MAX_FRAME_BYTES, Answer, Hello, Request, Welcome
from tests.process.conftest import ends

if TYPE_CHECKING:
    from tests.process.conftest import Connect, Eventually

NAMESPACE = bytes(32)
ROOT = NAMESPACE[:16]
TOKENS = pack_tokens(range(12))


def take_request(end: socket.socket) -> tuple[int, Request]:
    body = framing.receive(end, MAX_FRAME_BYTES, 20)
    assert body is not None, "the client closed"
    return protocol.decode_request(body)


class FakeServer:
    """The other end of a client, played by the test."""

    def __init__(self, memory_bytes: int = 4096) -> None:
        self.ends: list[socket.socket] = []
        self.memory_bytes = memory_bytes
        self.announced_bytes = memory_bytes

    def dial(self, _: threading.Event) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        self.ends.append(ours)
        return theirs

    def take(self) -> tuple[int, Request]:
        return take_request(self.ends[-1])

    def give(self, request_id: int, answer: Answer) -> None:
        self.ends[-1].sendall(protocol.encode(request_id, answer))

    def welcome(self, incarnation: str = "ab") -> Hello:
        request_id, hello = self.take()
        assert isinstance(hello, Hello)
        memory = os.memfd_create("fake")
        os.ftruncate(memory, self.memory_bytes)
        answer = Welcome(incarnation, "LocalCPUBackend", self.announced_bytes, os.getpid())
        socket.send_fds(self.ends[-1], [protocol.encode(request_id, answer)], [memory])
        os.close(memory)
        return hello


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    for end in server.ends:
        end.close()


@pytest.fixture
def open_client(fake: FakeServer, eventually: Eventually) -> Iterator[Callable[..., CacheClient]]:
    opened: list[CacheClient] = []

    def open_client(timeout_s: float = 20.0, **keys: object) -> CacheClient:
        hello = Hello(protocol.VERSION, "worker", "one", os.getpid(), rank=1, world_size=2)
        client = CacheClient(
            fake.dial,
            hello,
            timeout_s=timeout_s,
            reconnect=Reconnect(first_s=0.02, most_s=0.1),
            **keys,  # type: ignore[arg-type]
        )
        opened.append(client)
        eventually(lambda: fake.ends)
        return client

    yield open_client
    for client in opened:
        client.close()


def in_thread(call: Callable[[], object]) -> Callable[[], object]:
    """Start a call; the result waits for it, and is what it returned or raised."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except CacheUnavailable as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> object:
        thread.join(20)
        return results[0]

    return wait


def test_a_call_carries_rank_and_world_size(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client()
    assert fake.welcome().rank == 1
    assert client.wait_ready(20)
    pending = in_thread(lambda: client.allocate(NAMESPACE, 256, [StoreItem(ROOT, TOKENS, 5)]))
    request_id, request = fake.take()
    assert request == protocol.Allocate(NAMESPACE, 1, 2, 256, (StoreItem(ROOT, TOKENS, 5),))
    fake.give(request_id, protocol.Allocated((Grant("granted", 3, 64),)))
    grants = pending()
    assert grants == (Grant("granted", 3, 64),)
    assert getattr(grants, "incarnation", "") == "ab"
    client.release(9)
    assert fake.take()[1] == protocol.Release(9, rank=1)
    client.release(9, everyone=True)
    assert fake.take()[1] == protocol.Release(9, rank=None)


def test_a_late_answer_is_skipped_and_given_back(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client(timeout_s=0.2)
    fake.welcome()
    client.wait_ready(20)
    with pytest.raises(CacheTimeout):
        client.allocate(NAMESPACE, 256, [StoreItem(ROOT, TOKENS, 5)] * 2)
    late, _ = fake.take()
    with pytest.raises(CacheTimeout, match="has not answered for"):
        client.stats()
    grants = (Grant("granted", 7, 0), Grant("present"))
    fake.give(late, protocol.Allocated(grants))
    assert fake.take()[1] == protocol.Abandon((7,))
    pending = in_thread(lambda: client.commit([(1, 2)]))
    request_id, request = fake.take()
    assert request == protocol.Commit(((1, 2),))
    fake.give(request_id, protocol.Done(1))
    assert pending() == 1


def test_an_interrupted_call_gives_back_what_it_gets(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client()
    fake.welcome()
    client.wait_ready(20)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.lookup(NAMESPACE, TOKENS, 256)
    finally:
        signal.signal(signal.SIGALRM, before)
    request_id, _ = fake.take()
    fake.give(request_id, protocol.Found(5, "ab", ()))
    assert fake.take()[1] == protocol.Release(5, rank=None)


def test_memory_smaller_than_announced_is_refused(
    fake: FakeServer, open_client: Callable[..., CacheClient], eventually: Eventually
) -> None:
    fake.announced_bytes = 8192
    client = open_client()
    fake.welcome()
    eventually(lambda: len(fake.ends) > 1)
    with pytest.raises(CacheUnavailable, match="memory is less than 8192 bytes"):
        client.stats()
    assert not client.connected


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff\xff\xff",
        framing.frame(b"hi", 2),
        protocol.encode(0, protocol.Done()),
        protocol.encode(0, protocol.Failed("no")),
    ],
)
def test_what_is_no_welcome_is_refused_and_tried_again(
    fake: FakeServer,
    open_client: Callable[..., CacheClient],
    eventually: Eventually,
    answer: bytes,
) -> None:
    client = open_client()
    fake.take()
    fake.ends[-1].sendall(answer)
    eventually(lambda: len(fake.ends) > 1)
    fake.welcome()
    assert client.wait_ready(20)


@pytest.mark.parametrize("answer", [b"\xff\xff\xff\xff", framing.frame(b"hi", 2)])
def test_garbage_instead_of_an_answer_ends_the_connection(
    fake: FakeServer,
    open_client: Callable[..., CacheClient],
    eventually: Eventually,
    answer: bytes,
) -> None:
    client = open_client()
    fake.welcome()
    client.wait_ready(20)
    pending = in_thread(client.stats)
    fake.take()
    fake.ends[-1].sendall(answer)
    assert isinstance(pending(), CacheUnavailable)
    eventually(lambda: len(fake.ends) > 1)
    fake.welcome()
    assert client.wait_ready(20)


def test_the_wrong_kind_of_answer_ends_the_connection(
    fake: FakeServer, open_client: Callable[..., CacheClient], eventually: Eventually
) -> None:
    client = open_client()
    fake.welcome()
    client.wait_ready(20)
    pending = in_thread(lambda: client.lookup(NAMESPACE, TOKENS, 256))
    fake.give(fake.take()[0], protocol.Done())
    assert "answered with Done" in str(pending())
    eventually(lambda: len(fake.ends) > 1)


def test_closing_ends_calls_in_flight(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client(timeout_s=60)
    fake.welcome()
    client.wait_ready(20)
    pending = in_thread(client.stats)
    fake.take()
    client.close()
    assert isinstance(pending(), CacheUnavailable)
    with pytest.raises(CacheUnavailable, match="This client is closed"):
        client.stats()
    client.release(1)
    client.close()
    assert not client.wait_ready(60)


def test_closing_does_not_wait_for_a_server_that_does_not_greet(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client(greet_timeout_s=60.0)
    fake.take()
    assert ends(client.close)


def test_a_server_that_does_not_greet_is_tried_again(
    fake: FakeServer, open_client: Callable[..., CacheClient], eventually: Eventually
) -> None:
    client = open_client(greet_timeout_s=0.1)
    eventually(lambda: len(fake.ends) > 2)
    with pytest.raises(CacheUnavailable, match=r"did not greet within 0\.1 s"):
        client.stats()


def test_a_view_outlives_the_client(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client()
    fake.welcome()
    client.wait_ready(20)
    view = client.memory("ab")
    assert view is not None
    assert not view.readonly
    client.close()
    view[:5] = b"alive"
    assert bytes(view[:5]) == b"alive"
    assert client.memory("ab") is not None
    view.release()
    assert client.memory("ab") is None


def test_a_dial_that_can_never_work_is_raised_by_wait_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def dial(_: threading.Event) -> socket.socket:
        raise ConfigError("nothing to serve")

    hello = Hello(protocol.VERSION, "worker", "one", os.getpid())
    with CacheClient(dial, hello, timeout_s=1) as client:
        with pytest.raises(ConfigError, match="nothing to serve"):
            client.wait_ready(20)
        with pytest.raises(CacheUnavailable, match="nothing to serve"):
            client.stats()
    assert caplog.messages == ["no cache process: nothing to serve"]


@pytest.mark.parametrize(
    ("problem", "level"),
    [
        (CacheUnavailable("nobody listens"), "WARNING"),
        (CacheTimeout("not ready in 20 s"), "ERROR"),
        (CacheStartFailed("no room in /tmp"), "ERROR"),
    ],
)
def test_a_first_start_that_fails_is_an_error_and_ends_no_vllm(
    problem: KitError, level: str, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    def dial(_: threading.Event) -> socket.socket:
        raise problem

    hello = Hello(protocol.VERSION, "worker", "one", os.getpid())
    with CacheClient(dial, hello, timeout_s=1) as client:
        eventually(lambda: caplog.records)
        assert not client.wait_ready(0.01)
    assert [each.levelname for each in caplog.records] == [level]


def test_a_process_that_cannot_start_is_not_waited_for() -> None:
    def dial(_: threading.Event) -> socket.socket:
        raise CacheStartFailed("no room in /tmp")

    hello = Hello(protocol.VERSION, "worker", "one", os.getpid())
    with CacheClient(dial, hello, timeout_s=1) as client:
        assert ends(lambda: client.wait_ready(threading.TIMEOUT_MAX))


def test_a_process_that_is_only_absent_is_told_once_with_the_promise_to_go_on(
    eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = itertools.count()
    last = 0

    def dial(_: threading.Event) -> socket.socket:
        nonlocal last
        last = next(attempts)
        raise CacheUnavailable("nobody listens")

    hello = Hello(protocol.VERSION, "worker", "one", os.getpid())
    with CacheClient(dial, hello, timeout_s=1, reconnect=Reconnect(first_s=0.01)):
        eventually(lambda: last >= 3)
    assert caplog.messages == ["no cache process, serving goes on without: nobody listens"]


def test_waits_double_up_to_the_longest() -> None:
    waits = list(itertools.islice(Reconnect().waits(), 8))
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])


def test_threads_get_their_own_answers(connect: Connect) -> None:
    client = connect(blocking_timeout_secs=20)
    wrong: list[object] = []

    def work(number: int) -> None:
        for step in range(50):
            tokens = pack_tokens([number, step])
            grants = client.allocate(NAMESPACE, 256, [StoreItem(ROOT, tokens, 64)])
            client.commit([(grants[0].ticket, number)])
            found = client.lookup(NAMESPACE, tokens, 256)
            client.release(found.lease, everyone=True)
            if [chunk.key for chunk in found.chunks] != [chunk_key(NAMESPACE, ROOT, tokens)]:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert client.stats().values["leases"] == 0


def test_many_calls_wait_together(
    fake: FakeServer, open_client: Callable[..., CacheClient]
) -> None:
    client = open_client()
    fake.welcome()
    client.wait_ready(20)
    pending = [in_thread(partial(client.commit, [(number, 0)])) for number in range(5)]
    asked = [fake.take() for _ in pending]
    for request_id, request in reversed(asked):
        assert isinstance(request, protocol.Commit)
        fake.give(request_id, protocol.Done(request.written[0][0]))
    assert [wait() for wait in pending] == list(range(5))


def test_what_a_full_socket_does_not_take_is_sent_later_in_order() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    channel = Channel(theirs)
    requests = [protocol.Lookup(NAMESPACE, 256, bytes(50_000), number) for number in range(1, 51)]
    for request in requests[:-1]:
        channel.post(request)
    assert take_request(ours) == (1, requests[0])  # there is room again, but not for the last one
    channel.post(requests[-1])
    reader = threading.Thread(target=channel.run)
    reader.start()
    for number, request in enumerate(requests[1:], 2):
        assert take_request(ours) == (number, request)
    channel.close()
    reader.join()
    ours.close()


def test_a_peer_that_never_reads_fills_no_memory_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmcache_kit.process.channel.MAX_OUTBOX_BYTES", 1 << 20)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    reader = threading.Thread(target=channel.run)
    reader.start()
    request = protocol.Lookup(NAMESPACE, 256, bytes(100_000))
    with pytest.raises(CacheTimeout, match="does not read"):
        list(map(channel.post, [request] * 100))
    channel.close()
    reader.join()
    ours.close()
