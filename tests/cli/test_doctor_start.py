"""``lmcache-kit doctor`` tries what a start will try, and agrees with it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcache_kit.cli import checks
from lmcache_kit.cli.app import app
from lmcache_kit.config import load_config
from lmcache_kit.process.client import CacheClient
from lmcache_kit.service.launch import open_client
from tests.support.ports import taken_port
from tests.support.sites import FakeSite
from tests.support.waiting import eventually

Check = dict[str, str]
Environ = dict[str, str]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for a socket."""
    path = Path(tempfile.mkdtemp(prefix="lk-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)  # a process that ends removes its socket


@pytest.fixture
def environ(folder: Path) -> Environ:
    """A small cache with a disk below."""
    return {
        "LMCACHE_CACHE_SOCKET": str(folder / "c.sock"),
        "LMCACHE_CACHE_LINGER_S": "0",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.01",
        "LMCACHE_LOCAL_DISK": str(folder / "kv"),
        "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
    }


def doctor(environ: Environ) -> Callable[[str], Check]:
    """Run the command; return a function from a check's name to what it found, the worst first."""
    result = CliRunner().invoke(app, ["doctor", "--json"], env=environ)
    found = json.loads(result.output)
    assert result.exit_code == any(check["state"] == "fail" for check in found)
    order = ["fail", "warn", "ok"]
    return lambda name: min(
        (check for check in found if check["name"] == name),
        key=lambda check: order.index(check["state"]),
    )


def start(environ: Environ) -> CacheClient:
    """Start a cache process as vLLM's first worker does."""
    config = load_config(environ=environ).config
    return open_client(config, role="worker", wait_ready=True)


def test_what_works_in_doctor_works_in_the_start(environ: Environ) -> None:
    found = doctor(environ)
    assert found("memory")["state"] == found("cache process")["state"] == "ok"
    assert found("tier LocalDiskBackend")["detail"] == "opens, holds 0 chunks"
    with closing(start(environ)) as client:
        assert client.connected
        assert not client.stats().lower_tiers["LocalDiskBackend"]["down"]


def test_a_tier_that_does_not_open_fails_in_both(environ: Environ, folder: Path) -> None:
    (folder / "kv").write_text("a file")
    check = doctor(environ)("tier LocalDiskBackend")
    assert check["state"] == "fail"
    assert f"cannot use {folder}/kv/" in check["detail"]
    assert check["remedy"] == "A file has that name: set another path"
    with closing(start(environ)) as client:
        eventually(lambda: client.stats().lower_tiers["LocalDiskBackend"]["down"])


def test_more_memory_than_there_is_fails_in_both(
    environ: Environ, caplog: pytest.LogCaptureFixture
) -> None:
    environ |= {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1000000"}
    check = doctor(environ)("memory")
    assert (check["state"], "Set max_local_cpu_size to" in check["remedy"]) == ("fail", True)
    with closing(start(environ)) as client:
        assert not client.connected
    reason, _, _ = check["detail"].partition("; this machine has")  # an amount that changes
    assert reason in caplog.text


def test_a_folder_that_others_may_use_fails_in_both(environ: Environ, folder: Path) -> None:
    folder.chmod(0o755)
    check = doctor(environ)("cache process")
    assert (check["state"], "mode 0755" in check["detail"]) == ("fail", True)
    with closing(start(environ)) as client:
        assert not client.connected


def test_a_log_that_cannot_be_written_fails_in_both(environ: Environ, folder: Path) -> None:
    (folder / "c.sock.log").mkdir()
    assert "c.sock.log" in doctor(environ)("cache process")["detail"]
    with closing(start(environ)) as client:
        assert not client.connected


def test_beside_a_running_process_doctor_asks_that(environ: Environ, folder: Path) -> None:
    (folder / "kv").write_text("a file")
    with closing(start(environ)) as client:
        pid = client.stats().pid
        eventually(lambda: client.stats().lower_tiers["LocalDiskBackend"]["down"])
        found = doctor(environ)
        assert (
            f"does not work in the running cache process {pid}"
            in (found("tier LocalDiskBackend")["detail"])
        )
        (folder / "kv").unlink()
        eventually(lambda: not client.stats().lower_tiers["LocalDiskBackend"]["down"])
        found = doctor(environ)
        assert (
            f"open in the running cache process {pid}" in found("tier LocalDiskBackend")["detail"]
        )
        assert f"process {pid} runs" in found("memory")["detail"]
        assert found("cache process")["state"] == "ok"


def test_a_codec_is_warmed_up(environ: Environ, site: FakeSite) -> None:
    site.install("acme-cold", COLD)
    check = doctor({**environ, "LMCACHE_STORE_CODEC": "cold"})("store_codec cold")
    assert (check["state"], "no space for machine code" in check["detail"]) == ("fail", True)


def test_a_tier_that_never_opens_does_not_hang_doctor(
    environ: Environ, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("acme-far", FAR)
    monkeypatch.setattr(checks, "OPEN_S", 0.05)
    check = doctor({**environ, "LMCACHE_TIERS": "AcmeFar"})("tier AcmeFar")
    assert (check["state"], check["detail"]) == ("fail", "it does not open within 0.05 s")


def test_the_peer_port_is_tried(environ: Environ) -> None:
    with taken_port() as port:
        peers = {
            "LMCACHE_ENABLE_P2P": "1",
            "LMCACHE_P2P_INIT_PORTS": str(port),
            "LMCACHE_KIT_PLUGINS": "-nixl_transport",
        }
        check = doctor({**environ, **peers})("peers")
    assert check["state"] == "fail"
    assert f"cannot listen on port {port}" in check["detail"]


def test_key_files_are_read(environ: Environ) -> None:
    keys = {
        "LMCACHE_ENABLE_CONTROLLER": "1",
        "LMCACHE_CONTROLLER_URL": "localhost:1",
        "LMCACHE_CONTROLLER_KEY": "/no/c.key",
        "LMCACHE_WORKER_KEY": "/no/w.key_secret",
    }
    check = doctor({**environ, **keys})("worker_key")
    assert (check["state"], "/no/c.key cannot be read" in check["detail"]) == ("fail", True)


COLD = """
from lmcache_kit.interfaces import Codec

@hookimpl
def register_codecs():
    return [CodecSpec("cold", "acme_cold:Cold", "Does not warm up.")]

class Cold(Codec):
    format_version = 1
    def warm_up(self): raise OSError("no space for machine code")
    def encode(self, payload, chunk): raise NotImplementedError
    def decode(self, blob, chunk, out): raise NotImplementedError
    def describe(self, blob): raise NotImplementedError
    def max_blob_bytes(self, chunk): raise NotImplementedError
"""
FAR = """
import threading

@hookimpl
def register_backends():
    return [BackendSpec("AcmeFar", "acme_far:far", "Never opens.")]

def far():
    threading.Event().wait()
"""
