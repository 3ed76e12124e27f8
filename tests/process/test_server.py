"""The server's side of the local socket, against clients without manners."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import CacheUnavailable
from lmcache_kit.keys import pack_tokens
from lmcache_kit.process import paths, server
from lmcache_kit.protocol import local as protocol
from lmcache_kit.protocol.framing import HEADER, frame
from lmcache_kit.protocol.local import MAX_FRAME_BYTES, Failed, Welcome

if TYPE_CHECKING:
    from tests.process.conftest import Connect, Eventually, Raw

NAMESPACE = bytes(32)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("oversized frame", HEADER.pack(MAX_FRAME_BYTES + 1)),
        ("oversized first frame", HEADER.pack(server.MAX_HELLO_BYTES + 1)),
        ("garbage", b"GET / HTTP/1.1\r\n\r\n" * 1000),
        ("no msgpack", frame(b"\xc1\xc1\xc1\xc1", 4)),
        ("empty frame", frame(b"", 0)),
        ("other msgpack", frame(b"\x90", 1)),
        ("call before Hello", protocol.encode(1, protocol.GetStats())),
        ("answer as a request", protocol.encode(1, protocol.Done())),
        ("bad UTF-8", frame(b"\x92\x01\x82\xa4type\xa5hello\xabinstance_id\xa2\xff\xff", 99)),
        ("nested without end", frame(b"\x92\x01\x81\xa1x" + b"\x91" * 60_000, 1 << 16)),
    ],
)
def test_what_is_no_hello_ends_only_its_own_connection(
    connect: Connect, raw: Raw, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes
) -> None:
    monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 1000)
    client = connect(cache_process="embedded")
    hostile = raw()
    hostile.send(data)
    assert hostile.closed_by_peer, name
    assert client.stats().values["protocol_errors_total"] == 1
    assert isinstance(raw().hello(), Welcome)
    assert client.connected


def test_garbage_after_hello_ends_only_its_own_connection(connect: Connect, raw: Raw) -> None:
    client = connect()
    hostile = raw()
    assert isinstance(hostile.hello(), Welcome)
    hostile.send(frame(b"abc", 3))
    assert hostile.closed_by_peer
    values = client.stats().values
    assert (values["protocol_errors_total"], values["clients"]) == (1, 1)


def test_a_frame_cut_short_by_the_end_of_file_is_counted(
    connect: Connect, raw: Raw, eventually: Eventually
) -> None:
    client = connect()
    half = raw()
    assert isinstance(half.hello(), Welcome)
    half.send(protocol.encode(2, protocol.GetStats())[:-1])
    half.socket.close()
    eventually(lambda: client.stats().values["clients"] == 1)
    assert client.stats().values["protocol_errors_total"] == 1


def test_half_a_frame_holds_up_nobody_else(connect: Connect, raw: Raw) -> None:
    client = connect()
    data = protocol.encode(2, protocol.GetStats())
    slow = raw()
    assert isinstance(slow.hello(), Welcome)
    slow.send(data[:5])
    assert client.stats().values["clients"] == 2
    slow.send(data[5:-1])
    slow.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        slow.socket.recv(1)
    slow.socket.settimeout(20)
    slow.send(data[-1:])
    assert slow.socket.recv(HEADER.size)


def test_many_frames_at_once_are_answered_in_order(connect: Connect, raw: Raw) -> None:
    connect()
    eager = raw()
    assert isinstance(eager.hello(), Welcome)
    eager.send(b"".join(protocol.encode(each, protocol.GetStats()) for each in range(2, 100)))
    assert [eager.next_answer()[0] for _ in range(2, 100)] == list(range(2, 100))


def test_a_client_that_reads_no_answers_gets_no_more_memory_than_a_buffer(
    connect: Connect, raw: Raw
) -> None:
    client = connect()
    pid = client.stats().pid
    greedy = raw()
    assert isinstance(greedy.hello(), Welcome)
    data = protocol.encode(2, protocol.GetStats())
    before = resident_bytes(pid)
    greedy.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):  # the server stops to read
        greedy.socket.sendall(data * (1 << 20))
    assert resident_bytes(pid) - before < 4 << 20
    assert client.stats().values["clients"] == 2
    greedy.socket.settimeout(20)
    assert [greedy.next_answer()[0] for _ in range(5000)] == [2] * 5000


def test_silence_instead_of_hello_ends_after_a_time(
    connect: Connect, raw: Raw, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 0.1)
    client = connect(cache_process="embedded")
    silent = raw()
    assert silent.closed_by_peer
    assert client.stats().values["protocol_errors_total"] == 1


def test_a_second_hello_is_refused_and_the_first_stays(connect: Connect, raw: Raw) -> None:
    connect()
    twice = raw()
    assert isinstance(twice.hello(), Welcome)
    answer = twice.hello()
    assert isinstance(answer, Failed)
    assert "said Hello twice" in answer.message
    assert isinstance(twice.ask(protocol.GetStats()), protocol.Stats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, f"protocol version {protocol.VERSION}, the other side 99"),
        ({"instance_id": "other"}, "serves instance 'lmcache_default_instance', not 'other'"),
    ],
)
def test_a_client_of_another_version_or_instance_is_told_so(
    connect: Connect, raw: Raw, changes: dict[str, object], message: str
) -> None:
    connect()
    stranger = raw()
    answer = stranger.hello(**changes)
    assert isinstance(answer, Failed)
    assert message in answer.message
    assert stranger.closed_by_peer


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (protocol.Lookup(NAMESPACE, 0, b""), "chunk_size is 0"),
        (protocol.Lookup(NAMESPACE, 256, b"abc"), "3 bytes; packed tokens have 4"),
        (protocol.Lookup(b"short", 256, b""), "a namespace digest has 32 bytes"),
        (protocol.Allocate(NAMESPACE, 2, 2, 256, ()), "rank is 2; it must be 0 to 1"),
    ],
)
def test_a_request_that_makes_no_sense_fails_and_the_connection_stays(
    connect: Connect, raw: Raw, request_: protocol.Request, message: str
) -> None:
    connect()
    client = raw()
    assert isinstance(client.hello(), Welcome)
    answer = client.ask(request_)
    assert isinstance(answer, Failed)
    assert message in answer.message
    assert isinstance(client.ask(protocol.GetStats()), protocol.Stats)


def test_a_failed_request_reaches_the_caller_as_cache_unavailable(connect: Connect) -> None:
    client = connect()
    with pytest.raises(CacheUnavailable, match="could not serve a call: chunk_size is 0"):
        client.lookup(NAMESPACE, pack_tokens([1]), 0)
    assert client.connected


def test_another_users_connection_is_refused(
    connect: Connect, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 1000)
    client = connect(cache_process="embedded")
    monkeypatch.setattr(paths, "peer_uid", lambda _: os.getuid() + 1)
    stranger = raw()
    assert stranger.closed_by_peer
    assert client.stats().values["protocol_errors_total"] == 1


def test_the_kernel_says_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert paths.peer_uid(ours) == os.getuid()


def test_more_connections_than_allowed_are_closed(
    connect: Connect, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    client = connect(cache_process="embedded")
    second = raw()
    assert isinstance(second.hello(), Welcome)
    assert raw().closed_by_peer
    assert client.stats().values["clients"] == 2
    second.socket.close()


def test_leases_end_after_their_time_while_their_owner_lives(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect(lease_ttl_s=0.2)
    tokens = pack_tokens([1, 2, 3])
    item = StoreItem(NAMESPACE[:16], tokens, 10)
    [grant] = client.allocate(NAMESPACE, 256, [item])
    client.commit([(grant.ticket, 0)])
    assert client.lookup(NAMESPACE, tokens, 256).lease
    assert client.stats().values["leases"] == 1
    eventually(lambda: client.stats().values["expired_leases_total"] == 1)
    assert client.stats().values["leases"] == 0


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_frames_are_served_while_a_large_one_is_still_coming(connect: Connect, raw: Raw) -> None:
    client = connect()
    large = raw()
    assert isinstance(large.hello(), Welcome)
    data = protocol.encode(2, protocol.Lookup(NAMESPACE, 256, bytes(12 << 20)))
    large.send(data[: len(data) // 2])
    assert client.stats().values["clients"] == 2
    large.send(data[len(data) // 2 :])
    assert large.socket.recv(HEADER.size)
