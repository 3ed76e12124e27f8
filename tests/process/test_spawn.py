"""A cache process that its first client starts."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import CacheUnavailable, ConfigError, PluginNotFound
from lmcache_kit.keys import pack_tokens
from lmcache_kit.process import paths
from lmcache_kit.process.client import Reconnect
from lmcache_kit.service import launch
from tests.process.conftest import ends
from tests.support.ports import taken_port

if TYPE_CHECKING:
    from lmcache_kit.process.client import CacheClient
    from tests.process.conftest import Configure, Connect, Eventually, ProcessesAt, Script

NAMESPACE = bytes(32)
ROOT = NAMESPACE[:16]
TOKENS = pack_tokens(range(12))


def store(client: CacheClient, payload: bytes = b"payload") -> None:
    grants = client.allocate(NAMESPACE, 256, [StoreItem(ROOT, TOKENS, len(payload))])
    memory = client.memory(grants.incarnation)
    assert memory is not None
    memory[grants[0].offset : grants[0].offset + len(payload)] = payload
    assert client.commit([(grants[0].ticket, 0)]) == 1


def test_the_first_client_starts_a_process_that_others_share(
    connect: Connect, folder: Path, processes_at: ProcessesAt
) -> None:
    first, second = connect(), connect("scheduler")
    assert first.stats().pid == second.stats().pid != os.getpid()
    assert processes_at(folder) == [first.stats().pid]


def test_what_a_worker_writes_another_client_reads_in_place(connect: Connect) -> None:
    worker, scheduler = connect(), connect("scheduler")
    store(worker, payload=b"some KV")
    found = scheduler.lookup(NAMESPACE, TOKENS, 256)
    [extent] = found.chunks[0].extents
    memory = scheduler.memory(found.incarnation)
    assert memory is not None
    assert found.tokens == 12
    assert bytes(memory[extent.offset : extent.offset + extent.nbytes]) == b"some KV"


def test_clients_that_start_at_once_get_one_process(
    script: Script, folder: Path, processes_at: ProcessesAt
) -> None:
    body = """
        sys.stdin.readline()
        client = open_client(config, role="worker", wait_ready=True)
        print(client.stats().pid, flush=True)
        sys.stdin.readline()
    """
    racers = [script(body, cache_linger_s=5) for _ in range(4)]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    pids = {int(racer.stdout.readline()) for racer in racers if racer.stdout}
    assert len(pids) == 1
    assert processes_at(folder) == list(pids)


def test_it_ends_after_its_last_client_and_leaves_no_socket(
    connect: Connect, folder: Path, processes_at: ProcessesAt, eventually: Eventually
) -> None:
    first, second = connect(), connect()
    first.close()
    eventually(lambda: second.stats().values["clients"] == 1)
    second.close()
    eventually(lambda: not processes_at(folder))
    assert not (folder / "c.sock").exists()


def test_it_ends_when_no_client_ever_comes(
    configure: Configure,
    folder: Path,
    processes_at: ProcessesAt,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawner = launch._Spawner(configure(cache_linger_s=0), folder / "c.sock")
    spawner._start(threading.Event(), time.monotonic() + 20)
    assert len(processes_at(folder)) == 1
    eventually(lambda: not processes_at(folder))


def test_a_client_that_is_back_within_the_linger_finds_the_cache_warm(connect: Connect) -> None:
    client = connect(cache_linger_s=30)
    store(client)
    before = client.incarnation
    client.close()
    again = connect(cache_linger_s=30)
    assert again.incarnation == before
    assert again.lookup(NAMESPACE, TOKENS, 256).tokens == 12


def test_a_client_that_is_back_with_other_settings_gets_a_new_process(connect: Connect) -> None:
    client = connect(cache_linger_s=30)
    before = client.incarnation
    client.close()
    again = connect(cache_linger_s=30, max_local_cpu_size=1 / 32)
    assert again.incarnation != before
    assert again.stats().values["capacity_bytes"] == 1 << 25


def test_a_client_with_other_settings_joins_one_that_is_in_use(connect: Connect) -> None:
    client = connect()
    other = connect(max_local_cpu_size=1 / 32)
    assert other.incarnation == client.incarnation


def test_it_outlives_the_death_of_its_starter_and_all_descendants(
    script: Script, connect: Connect, folder: Path, processes_at: ProcessesAt
) -> None:
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        print("ready", flush=True)
        time.sleep(60)
    """
    starter = script(body, wait_for="ready", cache_linger_s=30)
    [pid] = processes_at(folder)
    assert children_of(starter.pid) == []
    assert os.getsid(pid) != os.getsid(starter.pid)
    starter.kill()
    starter.wait()
    assert connect(cache_linger_s=30).stats().pid == pid


def test_an_interrupt_from_the_terminal_does_not_reach_it(
    script: Script, folder: Path, processes_at: ProcessesAt, connect: Connect
) -> None:
    body = """
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        client = open_client(config, role="worker", wait_ready=True)
        print("ready", flush=True)
        time.sleep(60)
    """
    starter = script(body, wait_for="ready", stderr=subprocess.DEVNULL, cache_linger_s=30)
    [pid] = processes_at(folder)
    os.killpg(starter.pid, signal.SIGINT)
    assert starter.wait(timeout=20) != 0
    assert connect(cache_linger_s=30).stats().pid == pid


def test_it_does_not_hold_its_starters_pipes_open(
    script: Script, folder: Path, processes_at: ProcessesAt
) -> None:
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        print("ready", flush=True)
    """
    starter = script(body, stderr=subprocess.STDOUT, cache_linger_s=30)
    output, _ = starter.communicate(timeout=20)  # until the pipe's last writer has gone
    assert output == "ready\n"
    assert len(processes_at(folder)) == 1


def test_it_leaves_no_zombie(
    connect: Connect, eventually: Eventually, folder: Path, processes_at: ProcessesAt
) -> None:
    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}

    before = children()
    connect().close()
    eventually(lambda: not processes_at(folder))
    assert children() <= before


def test_sigterm_ends_it_at_once_with_clients_connected(
    connect: Connect, folder: Path, eventually: Eventually, processes_at: ProcessesAt
) -> None:
    client = connect()
    os.kill(client.stats().pid, signal.SIGTERM)
    client.close()
    eventually(lambda: not processes_at(folder))
    assert "ends: SIGTERM" in (folder / "c.sock.log").read_text()


def test_a_dead_processes_socket_is_replaced(
    connect: Connect, folder: Path, eventually: Eventually, processes_at: ProcessesAt
) -> None:
    client = connect()
    os.kill(client.stats().pid, signal.SIGKILL)
    client.close()
    eventually(lambda: not processes_at(folder))
    assert (folder / "c.sock").exists()
    assert connect().connected


def test_a_killed_starter_does_not_keep_others_from_starting(
    connect: Connect, script: Script, configure: Configure, folder: Path
) -> None:
    body = """
        from lmcache_kit.process import paths
        held = paths.starting_lock(config.cache_socket), paths.serving_lock(config.cache_socket)
        print("held", flush=True)
        time.sleep(60)
    """
    holder = script(body, wait_for="held")
    client = launch.open_client(configure(), role="worker")
    try:
        assert not client.wait_ready(0.3)
        holder.kill()
        assert client.wait_ready(20)
    finally:
        client.close()


def test_socket_and_files_are_for_their_owner_only(connect: Connect, folder: Path) -> None:
    connect()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "c.sock": 0o600,
        "c.sock.lock": 0o600,
        "c.sock.log": 0o600,
        "c.sock.start": 0o600,
    }


def test_a_backend_that_is_not_installed_is_said_at_once(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_KIT_PLUGINS", "-cpu_backend")
    with pytest.raises(
        PluginNotFound, match=r"LocalCPUBackend.*lmcache-kit-cpu-backend"
    ) as refusal:
        connect(cache_start_timeout_s=60)
    assert refusal.value.__context__ is None  # no trace of the socket that was not there yet


def test_an_unknown_cache_policy_is_said_with_the_known_ones(connect: Connect) -> None:
    with pytest.raises(ConfigError, match=r"cache_policy 'BEST'.*Known: FIFO, LFU, LRU"):
        connect(cache_policy="BEST")


def refusal(client: CacheClient, caplog: pytest.LogCaptureFixture) -> str:
    """Return the one error that is logged for a process that cannot start."""
    assert not client.connected
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    said = record.getMessage()
    assert said.startswith("no cache process, serving goes on without; the start is tried again")
    return said


def test_more_memory_than_there_is_is_said_with_the_key(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    said = refusal(connect(max_local_cpu_size=1e9), caplog)
    assert re.search(r"max_local_cpu_size is .* Set max_local_cpu_size to", said)


def test_a_directory_that_others_may_use_is_not_used(
    connect: Connect, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.chmod(0o755)
    said = refusal(connect(), caplog)
    assert re.search(r"mode 0755.*cache_socket", said)


def test_a_file_system_without_locks_is_said(
    connect: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(paths.fcntl, "flock", refuse)
    said = refusal(connect(), caplog)
    assert re.search(r"c\.sock\.start.*No locks available.*cache_socket", said)


def test_a_log_file_that_cannot_be_written_is_said(
    connect: Connect, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "c.sock.log").mkdir()
    assert "c.sock.log" in refusal(connect(), caplog)


def test_a_peer_port_that_is_taken_costs_moves_and_nothing_else(
    connect: Connect, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    with taken_port() as port:
        client = connect(enable_p2p=True, p2p_init_ports=(port,), transfer_channel="tcp")
        store(client)
        assert client.lookup(NAMESPACE, TOKENS, 256).tokens == 12
    said = f"nothing moves from or to this instance until a restart: .* port {port} .*free port"
    eventually(lambda: re.search(said, caplog.text))


def test_of_all_clients_of_an_engine_one_logs_the_error(
    connect: Connect, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.chmod(0o755)
    caplog.set_level(logging.INFO)
    clients = (connect(), connect(rank=1, world_size=2), connect("scheduler"))
    assert not any(client.connected for client in clients)
    said = [each.levelname for each in caplog.records if "no cache process" in each.getMessage()]
    assert sorted(said) == ["ERROR", "INFO", "INFO"]


def test_a_process_that_dies_as_it_starts_is_no_error_and_names_its_log(
    configure: Configure, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    client = launch.open_client(
        configure(cache_start_timeout_s=0.5), role="worker", wait_ready=True
    )
    try:
        assert not client.connected
        with pytest.raises(ConnectionError, match=r"ended as it started.*c\.sock\.log"):
            client.stats()
    finally:
        client.close()


def test_without_waiting_open_client_returns_before_the_process_is_there(
    configure: Configure,
) -> None:
    client = launch.open_client(configure(), role="worker")
    try:
        assert not client.connected
        assert client.wait_ready(20)
    finally:
        client.close()


def test_closing_a_client_that_is_still_starting_a_process_is_quick(
    configure: Configure, folder: Path
) -> None:
    client = launch.open_client(configure(), role="worker")
    assert ends(client.close)
    assert not client.connected


def test_a_long_log_begins_anew(connect: Connect, folder: Path) -> None:
    (folder / "c.sock.log").write_bytes(b"x" * (2 << 20))
    connect()
    assert (folder / "c.sock.log").stat().st_size < 1 << 20


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_a_file_that_is_no_socket_is_left_alone(
    connect: Connect, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "c.sock").write_text("precious")
    assert "exists and is not a socket" in refusal(connect(), caplog)
    assert (folder / "c.sock").read_text() == "precious"


def test_a_socket_path_that_is_too_long_is_refused(connect: Connect, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"longer than the 107 bytes.*cache_socket"):
        connect(cache_socket=folder / ("x" * 100))


def test_a_stranger_socket_in_place_is_replaced(connect: Connect, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(folder / "c.sock"))
    assert connect().connected


def test_what_could_not_be_composed_is_tried_again_later(
    configure: Configure, folder: Path, eventually: Eventually
) -> None:
    folder.chmod(0o755)
    client = launch.open_client(configure(), role="worker", reconnect=Reconnect(broken_s=0.1))
    try:
        assert not client.wait_ready(20)
        with pytest.raises(CacheUnavailable, match="mode 0755"):
            client.stats()
        folder.chmod(0o700)
        eventually(lambda: client.connected)
    finally:
        client.close()
