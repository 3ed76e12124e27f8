"""Killed, stopped and restarted processes, of either side."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import CacheTimeout, CacheUnavailable
from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.process import channel
from tests.support.processes import freeze

if TYPE_CHECKING:
    from lmcache_kit.process.client import CacheClient
    from tests.process.conftest import Configure, Connect, Eventually, ProcessesAt, Script

NAMESPACE = bytes(32)
ROOT = NAMESPACE[:16]
TOKENS = pack_tokens(range(12))


def store(client: CacheClient, payload: bytes = b"payload") -> int:
    """Store one chunk; returns its offset."""
    grants = client.allocate(NAMESPACE, 256, [StoreItem(ROOT, TOKENS, len(payload))])
    memory = client.memory(grants.incarnation)
    assert memory is not None
    memory[grants[0].offset : grants[0].offset + len(payload)] = payload
    assert client.commit([(grants[0].ticket, 0)]) == 1
    return grants[0].offset


def kill(client: CacheClient) -> str:
    """SIGKILL the client's cache process; returns which incarnation that was."""
    incarnation = client.incarnation
    assert incarnation is not None
    os.kill(client.stats().pid, signal.SIGKILL)
    return incarnation


def kill_and_come_back(client: CacheClient, eventually: Eventually) -> None:
    lost = kill(client)
    eventually(lambda: client.connected and client.incarnation != lost)
    store(client)


def test_a_killed_process_is_replaced_and_the_client_comes_back(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect()
    before = kill(client)
    eventually(lambda: client.connected and client.incarnation != before)
    assert client.lookup(NAMESPACE, TOKENS, 256).tokens == 0
    store(client)
    assert client.lookup(NAMESPACE, TOKENS, 256).tokens == 12


def test_a_call_in_flight_fails_as_soon_as_the_process_is_killed(connect: Connect) -> None:
    client = connect(blocking_timeout_secs=60)
    pid = client.stats().pid
    freeze(pid)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(CacheUnavailable, match="has gone"):
        client.lookup(NAMESPACE, TOKENS, 256)
    killer.join()


def test_without_a_process_calls_fail_at_once_and_say_why(
    connect: Connect, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(blocking_timeout_secs=60)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    kill(client)
    eventually(lambda: not client.connected)
    with pytest.raises(CacheUnavailable, match="no cache process is connected"):
        client.lookup(NAMESPACE, TOKENS, 256)
    client.release(1)


def test_memory_of_a_killed_process_stays_readable_for_who_holds_it(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect()
    offset = store(client, b"still here")
    held = client.memory(client.incarnation or "")
    assert held is not None
    before = kill(client)
    eventually(lambda: client.connected and client.incarnation != before)
    assert bytes(held[offset : offset + 10]) == b"still here"
    fresh = client.memory(client.incarnation or "")
    assert fresh is not None
    assert bytes(fresh[offset : offset + 10]) == bytes(10)


def test_memory_of_a_killed_process_can_still_be_asked_for_until_there_is_a_new_one(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect()
    held = client.memory(kill(client))
    assert held is not None
    before = client.incarnation
    eventually(lambda: client.connected and client.incarnation != before)
    assert client.memory(before or "") is not None
    del held
    eventually(lambda: client.memory(before or "") is None)


def test_memory_of_a_process_that_stays_away_is_let_go(
    connect: Connect, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what earlier tests left open
    others = mapped_slabs()
    client = connect()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    before = kill(client)
    eventually(lambda: client.memory(before) is None)
    assert mapped_slabs() == others


def test_restarts_leak_neither_descriptors_nor_mappings(
    connect: Connect, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    gc.collect()  # what earlier tests left open
    others = mapped_slabs()
    client = connect()
    store(client)
    before = open_fds(), mapped_slabs(), threading.active_count()
    for _ in range(8):
        kill_and_come_back(client, eventually)
    gc.collect()
    assert (open_fds(), mapped_slabs(), threading.active_count()) == before
    client.close()
    assert mapped_slabs() == others


def test_a_stopped_process_costs_one_deadline_and_then_nothing(connect: Connect) -> None:
    client = connect(blocking_timeout_secs=0.5)
    pid = client.stats().pid
    freeze(pid)
    try:
        with pytest.raises(CacheTimeout, match=r"did not answer within 0\.5 s"):
            client.lookup(NAMESPACE, TOKENS, 256)
        for _ in range(100):
            with pytest.raises(CacheTimeout, match="has not answered for"):
                client.lookup(NAMESPACE, TOKENS, 256)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_after_it_goes_on_calls_work_and_what_came_late_is_given_back(
    connect: Connect, eventually: Eventually
) -> None:
    client, other = connect(blocking_timeout_secs=0.3), connect(blocking_timeout_secs=0.3)
    store(client)
    item = StoreItem(ROOT, pack_tokens([7]), 100)
    pid, before = client.stats().pid, client.incarnation
    freeze(pid)
    try:
        with pytest.raises(CacheTimeout):
            client.lookup(NAMESPACE, TOKENS, 256)
        with pytest.raises(CacheTimeout):
            other.allocate(NAMESPACE, 256, [item])
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: client.stats().values["leases"] == 0)
    eventually(lambda: client.stats().values["abandoned_total"] == 1)
    assert client.stats().values["lookups_total"] == 1
    assert client.lookup(NAMESPACE, TOKENS, 256).tokens == 12
    assert client.incarnation == before


def test_calls_larger_than_the_sockets_buffer_keep_the_stream_in_step(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect(blocking_timeout_secs=0.3)
    store(client)
    pid = client.stats().pid
    freeze(pid)
    try:
        with pytest.raises(CacheTimeout):
            client.lookup(NAMESPACE, bytes(8 << 20), 256)
        client.release(12345)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: client.lookup(NAMESPACE, TOKENS, 256).tokens == 12)
    assert client.stats().values["protocol_errors_total"] == 0


def test_a_process_that_never_answers_is_dialled_again(
    connect: Connect, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "GIVE_UP_S", 0.5)
    client = connect(blocking_timeout_secs=0.1)
    store(client)
    pid = client.stats().pid
    freeze(pid)
    try:
        with pytest.raises(CacheTimeout):
            client.lookup(NAMESPACE, TOKENS, 256)
        eventually(lambda: not client.connected)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: client.lookup(NAMESPACE, TOKENS, 256).tokens == 12)
    assert client.stats().pid == pid
    assert client.stats().values["leases"] == 1


@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_a_dead_clients_leases_and_unfinished_stores_are_freed_at_once(
    connect: Connect, script: Script, eventually: Eventually, how: str
) -> None:
    client = connect()
    store(client)
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        namespace = bytes(32)
        assert client.lookup(namespace, pack_tokens(range(12)), 256).lease
        item = StoreItem(namespace[:16], pack_tokens([5]), 1000)
        assert client.allocate(namespace, 256, [item])[0].status == "granted"
        print("holds", flush=True)
        sys.stdin.readline()
        os._exit(1)
    """
    holder = script(body, wait_for="holds")
    values = client.stats().values
    assert (values["leases"], values["pending"], values["clients"]) == (1, 1, 2)
    if how == "SIGKILL":
        holder.kill()
    else:
        assert holder.stdin
        holder.stdin.close()
    eventually(lambda: client.stats().values["clients"] == 1)
    values = client.stats().values
    assert (values["leases"], values["pending"]) == (0, 0)


def test_a_dead_client_is_noticed_though_a_forked_child_of_it_lives(
    connect: Connect, script: Script, eventually: Eventually
) -> None:
    client = connect()
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        if os.fork() == 0:
            try:
                client.stats()
            except ConnectionError as error:
                print(error, flush=True)
            os.close(1)
            sys.stdin.readline()
            os._exit(0)
        client.stats()
        time.sleep(60)
    """
    parent = script(body, wait_for="the cache process has gone")
    assert client.stats().values["clients"] == 2
    parent.kill()
    eventually(lambda: client.stats().values["clients"] == 1)


def test_a_lease_of_an_earlier_process_does_not_release_one_of_the_next(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect()
    store(client)
    lost_lease = client.lookup(NAMESPACE, TOKENS, 256).lease
    before = kill(client)
    eventually(lambda: client.connected and client.incarnation != before)
    store(client)
    assert client.lookup(NAMESPACE, TOKENS, 256).lease
    client.release(lost_lease, everyone=True)
    assert client.stats().values["leases"] == 1


def test_clients_keep_serving_each_other_while_one_is_stopped(
    connect: Connect, script: Script
) -> None:
    client = connect()
    store(client)
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        print("ready", flush=True)
        while True:
            client.release(1)
    """
    flooder = script(body, wait_for="ready")
    freeze(flooder.pid)
    assert client.lookup(NAMESPACE, TOKENS, 256).tokens == 12


def test_a_linger_of_its_own_does_not_end_a_process_that_came_back_to_work(
    connect: Connect, folder: Path, processes_at: ProcessesAt, configure: Configure
) -> None:
    connect(cache_linger_s=0.5).close()
    client = connect(cache_linger_s=0.5)
    pid = client.stats().pid
    time.sleep(1.0)  # nothing to wait for: it must not end
    assert client.stats().pid == pid
    assert processes_at(folder) == [pid]


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_slabs() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:lmcache-kit")


def test_a_client_that_uses_another_namespace_says_so_after_each_connection(
    connect: Connect, eventually: Eventually
) -> None:
    client = connect()
    first = Namespace("m", KVLayout("float16", 1, 1, 8), 4)
    second = msgspec.structs.replace(first, generation="g")
    for namespace in (first, second):
        client.use_namespace(namespace)
        eventually(lambda namespace=namespace: client.stats().namespaces == (namespace,))  # type: ignore[misc]
    os.kill(client.stats().pid, signal.SIGKILL)
    eventually(lambda: client.connected and client.stats().namespaces == (second,))
