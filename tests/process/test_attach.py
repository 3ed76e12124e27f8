"""Clients of a cache process that a service manager runs, and of one in their own process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import CacheUnavailable, ConfigError, PluginNotFound
from lmcache_kit.keys import pack_tokens
from lmcache_kit.service import launch
from lmcache_kit.service.service import serve

if TYPE_CHECKING:
    from lmcache_kit.process.client import CacheClient
    from tests.process.conftest import Configure, Connect, Eventually, ProcessesAt, Script

NAMESPACE = bytes(32)
TOKENS = pack_tokens(range(12))
SERVICE = """
    from lmcache_kit.service.service import serve
    serve(
        config,
        socket=config.cache_socket,
        linger_s=None,
        on_ready=lambda: print("ready", flush=True),
    )
    print("ended", flush=True)
"""


def store(client: CacheClient) -> None:
    [grant] = client.allocate(NAMESPACE, 256, [StoreItem(NAMESPACE[:16], TOKENS, 7)])
    assert client.commit([(grant.ticket, 0)]) == 1


def test_attach_starts_nothing_and_calls_fail_at_once(
    connect: Connect, folder: Path, processes_at: ProcessesAt
) -> None:
    client = connect(cache_process="attach", cache_start_timeout_s=0.3)
    assert not client.connected
    assert client.incarnation is None
    with pytest.raises(CacheUnavailable, match=r"no cache process is connected.*nobody|c\.sock"):
        client.lookup(NAMESPACE, TOKENS, 256)
    assert processes_at(folder) == []


def test_attach_connects_when_a_process_appears(
    connect: Connect, script: Script, eventually: Eventually
) -> None:
    client = connect(cache_process="attach", cache_start_timeout_s=0.1)
    assert not client.connected
    service = script(SERVICE, wait_for="ready")
    eventually(lambda: client.connected)
    assert client.stats().pid == service.pid


def test_a_service_goes_on_without_clients_and_with_clients_of_other_settings(
    connect: Connect, script: Script
) -> None:
    service = script(SERVICE, wait_for="ready")
    client = connect(cache_process="attach")
    store(client)
    client.close()
    spawning = connect(max_local_cpu_size=1 / 32)
    assert spawning.stats().pid == service.pid
    assert spawning.lookup(NAMESPACE, TOKENS, 256).tokens == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_in_order(
    script: Script, folder: Path, number: signal.Signals
) -> None:
    service = script(SERVICE, wait_for="ready")
    service.send_signal(number)
    assert service.stdout
    assert service.stdout.read() == "ended\n"
    assert service.wait(20) == 0
    assert not (folder / "c.sock").exists()


@pytest.mark.parametrize(
    "hanging",
    [
        "LocalCPUBackend.close = hang",
        "threading.Thread(target=hang).start()",
    ],
    ids=["a backend that does not close", "a thread that does not end"],
)
def test_what_hangs_does_not_keep_a_service_from_ending_and_is_named(
    script: Script, hanging: str
) -> None:
    prelude = f"""
    import threading, time
    from lmcache_kit.service import service as host
    from lmcache_kit_cpu_backend.backend import LocalCPUBackend
    host.END_S = 0.5
    def hang(*_):
        time.sleep(600)
    {hanging}
    """
    service = script(prelude + SERVICE, wait_for="ready", stderr=subprocess.PIPE)
    service.terminate()
    _, said = service.communicate(timeout=20)
    assert service.returncode == 1
    assert "Timeout (0:00:00.5" in said
    assert "in hang\n" in said


def test_a_second_service_at_the_same_socket_is_refused(
    script: Script, configure: Configure, folder: Path
) -> None:
    script(SERVICE, wait_for="ready")
    with pytest.raises(CacheUnavailable, match=r"another cache process serves at .*c.sock"):
        serve(configure(), socket=folder / "c.sock", linger_s=None)


def test_a_service_that_is_killed_and_started_again_gets_its_clients_back(
    connect: Connect, script: Script, eventually: Eventually
) -> None:
    service = script(SERVICE, wait_for="ready")
    client = connect(cache_process="attach")
    service.kill()
    eventually(lambda: not client.connected)
    again = script(SERVICE, wait_for="ready")
    eventually(lambda: client.connected)
    assert client.stats().pid == again.pid


def test_embedded_serves_in_this_process_and_is_shared_in_it(
    connect: Connect, folder: Path
) -> None:
    worker = connect(cache_process="embedded")
    scheduler = connect("scheduler", cache_process="embedded")
    store(worker)
    assert scheduler.lookup(NAMESPACE, TOKENS, 256).tokens == 12
    assert scheduler.stats().pid == os.getpid()


def test_embedded_ends_with_its_last_client(
    connect: Connect, folder: Path, eventually: Eventually
) -> None:
    first, second = (connect(cache_process="embedded") for _ in range(2))
    first.close()
    eventually(lambda: second.stats().values["clients"] == 1)
    second.close()
    assert not (folder / "c.sock").exists()
    assert "lmcache-kit-cache" not in {thread.name for thread in threading.enumerate()}


def test_embedded_can_be_opened_again(connect: Connect) -> None:
    first = connect(cache_process="embedded")
    before = first.incarnation
    first.close()
    assert connect(cache_process="embedded").incarnation != before


def test_embedded_attaches_when_another_process_has_the_cache(
    connect: Connect, script: Script
) -> None:
    service = script(SERVICE, wait_for="ready")
    assert connect(cache_process="embedded").stats().pid == service.pid


def test_embedded_ends_with_the_interpreter(script: Script, folder: Path) -> None:
    body = """
        client = open_client(config, role="worker", wait_ready=True)
        assert client.stats().pid == os.getpid()
        print("ready", flush=True)
    """
    process = script(body, cache_process="embedded", stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=20)
    assert output == "ready\n"
    assert process.returncode == 0
    assert not (folder / "c.sock").exists()


def test_embedded_refuses_what_cannot_be_composed(
    connect: Connect, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cache_policy 'BEST'"):
        launch.open_client(configure(cache_process="embedded", cache_policy="BEST"), role="worker")
    with monkeypatch.context() as patched:
        patched.setenv("LMCACHE_KIT_PLUGINS", "-cpu_backend")
        with pytest.raises(PluginNotFound, match="LocalCPUBackend"):
            launch.open_client(configure(cache_process="embedded"), role="worker")
    assert connect(cache_process="embedded").connected
