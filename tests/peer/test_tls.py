"""Moves in TLS: both sides show a certificate of the same authority, or nothing moves."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from lmcache_kit.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from .conftest import MakePlace, Place

Keys = dict[str, object]


@pytest.fixture
def keys(tmp_path: Path) -> Callable[..., Keys]:
    """Keys of a configuration, with a certificate of this authority for this host."""
    authorities: dict[str, trustme.CA] = {}

    def keys(authority: str = "ours", host: str = "127.0.0.1") -> Keys:
        ca = authorities.setdefault(authority, trustme.CA())
        folder = tmp_path / f"{authority}-{host}"
        folder.mkdir(exist_ok=True)
        made = ca.issue_cert(host)
        made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        made.private_key_pem.write_to_path(folder / "key.pem")
        ca.cert_pem.write_to_path(folder / "ca.pem")
        return {
            "p2p_tls_cert": folder / "cert.pem",
            "p2p_tls_key": folder / "key.pem",
            "p2p_tls_ca": folder / "ca.pem",
        }

    return keys


def moved(goal: Place, source: Place) -> str:
    """How a move ended, and that nothing was lost."""
    source.store(range(40))
    outcome = goal.move(source, range(40))
    assert max(goal.hit(range(40)), source.hit(range(40))) == 40
    return f"{outcome.state}: {outcome.message}"


def test_kv_moves_in_tls(make_place: MakePlace, keys: Callable[..., Keys]) -> None:
    source, goal = make_place("source", **keys()), make_place("goal", **keys())
    assert moved(goal, source) == "done: "
    assert goal.hit(range(40)) == 40


def test_a_peer_of_another_authority_is_refused(
    make_place: MakePlace, keys: Callable[..., Keys]
) -> None:
    source, goal = make_place("source", **keys("ours")), make_place("goal", **keys("theirs"))
    said = moved(goal, source)
    assert said.startswith("failed: no TLS with 127.0.0.1:")
    assert "certificate verify failed" in said


def test_a_certificate_of_another_host_is_refused(
    make_place: MakePlace, keys: Callable[..., Keys]
) -> None:
    source = make_place("source", **keys(host="elsewhere.example"))
    goal = make_place("goal", **keys())
    assert "failed: no TLS with" in moved(goal, source)


def test_who_speaks_no_tls_gets_nothing(make_place: MakePlace, keys: Callable[..., Keys]) -> None:
    source, goal = make_place("source", **keys()), make_place("goal")
    assert moved(goal, source).startswith("failed: instance 'source' ")


def test_who_insists_on_tls_takes_nothing_without(
    make_place: MakePlace, keys: Callable[..., Keys]
) -> None:
    source, goal = make_place("source"), make_place("goal", **keys())
    assert moved(goal, source).startswith("failed: no TLS with")


def test_files_that_are_no_certificates_stop_the_start(
    make_place: MakePlace, keys: Callable[..., Keys], tmp_path: Path
) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    with pytest.raises(ConfigError, match=r"p2p_tls_cert .* cannot be used"):
        make_place("source", **{**keys(), "p2p_tls_cert": tmp_path / "no.pem"})


def test_a_peer_port_that_is_taken_is_said(make_place: MakePlace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=f"p2p_init_ports: cannot listen on port {port}"):
            make_place("source", p2p_init_ports=(port,))


def test_a_host_that_is_not_ours_is_said(make_place: MakePlace) -> None:
    with pytest.raises(TransportError, match=r"p2p_host|p2p_init_ports"):
        make_place("source", p2p_host="192.0.2.1")


def test_a_transport_that_is_not_installed_stops_the_start(make_place: MakePlace) -> None:
    with pytest.raises(LookupError, match="no transport 'pigeon' is installed"):
        make_place("source", transfer_channel="pigeon")


def test_options_of_a_transport_are_checked_at_the_start(make_place: MakePlace) -> None:
    options = {"nixl": {"allow_tpc": True}}
    with pytest.raises(ConfigError, match=r"transport_options: nixl\.allow_tpc"):
        make_place("source", transfer_channel="nixl", transport_options=options)
