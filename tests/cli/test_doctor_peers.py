"""What ``lmcache-kit doctor`` says of moves between instances."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lmcache_kit.cli.app import app

if TYPE_CHECKING:
    from tests.support.sites import FakeSite

TRANSPORT = """
@hookimpl
def register_transports():
    return [TransportSpec({name!r}, "{module}:make", "By pigeon.", probe="{module}:why_not",
                          capabilities=frozenset({{"one-sided"}}))]
def why_not():
    return {reason!r}
"""
PEERS = {
    "LMCACHE_ENABLE_P2P": "1",
    "LMCACHE_ENABLE_CONTROLLER": "1",
    "LMCACHE_CONTROLLER_URL": "localhost:1",
    "LMCACHE_KIT_PLUGINS": "-nixl_transport",
}


def findings(**environ: str) -> dict[str, list[dict[str, str]]]:
    result = CliRunner().invoke(app, ["doctor", "--json"], env=environ)
    found: dict[str, list[dict[str, str]]] = {}
    for check in json.loads(result.output):
        found.setdefault(check["name"], []).append(check)
    return found


def test_doctor_says_that_moves_are_not_configured() -> None:
    (check,) = findings()["peers"]
    assert (check["state"], check["detail"]) == ("ok", "not configured (enable_p2p)")


def test_doctor_tries_each_transport_and_says_by_what_moves_would_go() -> None:
    found = findings(**{**PEERS, "LMCACHE_KIT_PLUGINS": ""})
    (nixl,), (tcp,), (peers,) = (
        found[name] for name in ("transport nixl", "transport tcp", "peers")
    )
    assert nixl["detail"] == "works; would reach peers on this host by CMA on one host"
    assert tcp["detail"] == "works; would reach peers on this host by TCP"
    assert peers["detail"] == "transfer_channel auto: nixl is tried first, then tcp"


def test_doctor_says_why_a_transport_does_not_start_here() -> None:
    environ = {**PEERS, "LMCACHE_KIT_PLUGINS": "", "UCX_TLS": "rc"}
    found = findings(**environ, LMCACHE_TRANSFER_CHANNEL="nixl")
    (check,) = found["transport nixl"]
    assert check["state"] == "warn"
    assert "UCX found no usable transport with UCX_TLS=rc on this host" in check["detail"]
    (peers,) = found["peers"]
    assert peers["detail"] == "transfer_channel nixl: tcp is tried first"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os.abort()", "it ended the process that probed it (exit code -6)"),
        ("raise ValueError('of mine')", "ValueError: of mine"),
        ("return 5", "5 is no Transport"),
    ],
)
def test_doctor_survives_a_transport_that_does_not(site: FakeSite, fault: str, said: str) -> None:
    code = TRANSPORT.format(name="pigeon", module="acme_pigeon", reason="")
    site.install("acme-pigeon", f"{code}\nimport os\ndef make(memory, host):\n    {fault}\n")
    (check,) = findings(**PEERS, PYTHONPATH=str(site.folder))["transport pigeon"]
    assert check["detail"] == f"cannot be used here: {said}"


@pytest.mark.parametrize(("channel", "state"), [("auto", "ok"), ("pigeon", "warn")])
def test_doctor_warns_about_a_transport_that_cannot_be_used_if_it_is_asked_for(
    site: FakeSite, channel: str, state: str
) -> None:
    code = TRANSPORT.format(name="pigeon", module="acme_pigeon", reason="it rains")
    site.install("acme-pigeon", code)
    found = findings(**PEERS, LMCACHE_TRANSFER_CHANNEL=channel)
    (check,) = found["transport pigeon"]
    assert (check["state"], check["detail"]) == (state, "cannot be used here: it rains")
    assert bool(check["remedy"]) == (state == "warn")
    (peers,) = found["peers"]
    assert peers["detail"] == f"transfer_channel {channel}: tcp is tried first"


def test_doctor_warns_about_a_transport_that_is_not_installed() -> None:
    found = findings(**PEERS, LMCACHE_TRANSFER_CHANNEL="nixl")
    (check,) = found["transport nixl"]
    assert (check["state"], "lmcache-kit-nixl-transport" in check["detail"]) == ("warn", True)
    (check,) = findings(**PEERS, LMCACHE_TRANSFER_CHANNEL="pigeon")["transport pigeon"]
    assert check["detail"] == "no transport 'pigeon' is installed"


def test_doctor_warns_when_nothing_can_move_at_all() -> None:
    environ = {**PEERS, "LMCACHE_KIT_PLUGINS": "-nixl_transport,-tcp_transport"}
    (check,) = findings(**environ)["peers"]
    assert check["state"] == "warn"
    assert "no transport can be used" in check["detail"]
    assert check["remedy"].startswith("pip install")


def test_doctor_warns_about_moves_without_a_controller() -> None:
    first, _ = findings(LMCACHE_ENABLE_P2P="1")["peers"]
    assert first["state"] == "warn"
    assert first["remedy"].startswith("Set enable_controller and controller_url")
