"""What it takes to start, and what is said where it is missing."""

from __future__ import annotations

import ipaddress

import pytest
from lmcache_kit_nixl_transport import library, probe
from lmcache_kit_nixl_transport.options import NixlOptions
from lmcache_kit_nixl_transport.transport import NixlTransport
from pydantic import ValidationError

from lmcache_kit.errors import TransportError
from tests.support.processes import run_python


def test_nixl_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    assert "pip install 'lmcache-kit-nixl-transport[nixl]'" in probe.why_not()
    assert "--no-deps nixl-cu12" in probe.why_not()


@pytest.mark.parametrize("present", probe.MODULES)
def test_any_of_nixls_modules_is_enough(monkeypatch, present):
    monkeypatch.setattr(probe, "find_spec", lambda name: name in {present, "numpy"} or None)
    assert probe.why_not() == ""


def test_numpy_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(probe, "find_spec", lambda name: name == "nixl_cu13" or None)
    assert "pip install numpy" in probe.why_not()


def test_asking_imports_neither_nixl_nor_numpy():
    code = (
        "import sys, lmcache_kit_nixl_transport.probe as probe; probe.why_not();"
        "print(sorted({'nixl', 'nixl_cu12', 'nixl_cu13', 'numpy'} & sys.modules.keys()))"
    )
    assert run_python(code).strip() == "[]"


def test_nixl_that_does_not_import_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(library, "MODULES", ("nixl_of_nowhere",))
    with pytest.raises(TransportError, match="nixl_of_nowhere: No module named"):
        library.load()


def test_ucx_without_a_usable_transport_is_a_reason_and_no_crash(start):
    remote = start(ucx_tls="rc")
    assert "UCX found no usable transport with UCX_TLS=rc on this host" in remote.error
    assert "UCX_TLS=rc,cma,tcp" in remote.error
    assert remote.process.wait(30) == 0


def test_a_backend_that_is_not_there_is_named_with_those_that_are(make_here):
    with pytest.raises(TransportError, match=r"no backend NOPE.* Known: .*UCX"):
        make_here(backends=("UCX", "NOPE"))


def test_memory_that_cannot_be_written_is_refused():
    with pytest.raises(TransportError, match="writable"):
        NixlTransport(memoryview(bytes(4096)), "127.0.0.1")


def test_ucx_listens_on_loopback_alone_where_peers_reach_us_by_it(owner):
    addresses = owner.ask("listens_on")
    assert addresses
    assert all(ipaddress.ip_address(each).is_loopback for each in addresses)


def test_the_environment_is_left_as_it_was(here, monkeypatch):
    import os

    assert "UCX_NET_DEVICES" not in os.environ


def test_network_devices_that_the_user_names_are_left_alone(monkeypatch, make_here, start):
    monkeypatch.setenv("UCX_NET_DEVICES", "nowhere0")
    monkeypatch.setenv("UCX_TLS", "tcp")
    assert "UCX_NET_DEVICES=nowhere0" in start().error


def test_standard_output_stays_empty(make_here, capfd):
    make_here()
    assert capfd.readouterr().out == ""


def test_an_idle_process_costs_little(owner):
    """Unpaced, NIXL takes 0.5 to 0.9 of a core."""
    assert owner.ask("idle_cpu", 2.0) < 0.1


def test_all_is_given_back_when_the_transport_closes(start):
    remote = start()
    remote.ask("close")


@pytest.mark.parametrize(
    "options", [{"backends": ()}, {"progress_delay_us": -1}, {"allow_rdma": True}]
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        NixlOptions(**options)
