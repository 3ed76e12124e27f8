"""Peers that die, stall and come back, over CMA and over TCP."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from lmcache_kit_nixl_transport import rdma, wire

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Region
from tests.support.waiting import eventually

from .conftest import SLAB_BYTES, regions

MANY = regions([6 << 20] * 8)


@pytest.fixture
def over_tcp(monkeypatch, make_here, start):
    """This process and a peer that have nothing but TCP, and use it."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    remote, here = start(), make_here(allow_tcp=True)
    remote.ask("fill", 2)
    return here, remote


def stays_as_it_is(here, seconds: float = 0.3) -> bool:
    """For as long as it takes bytes that are under way to come; NIXL is looked at meanwhile."""
    before = here.checksum(Region(0, SLAB_BYTES))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        here.transport.in_flight()
        time.sleep(0.01)
    return here.checksum(Region(0, SLAB_BYTES)) == before


def read_from_a_stalled_peer(here, remote, timeout_s: float = 0.3) -> TransferTimeout:
    link = here.connect(remote)
    offer = remote.ask("offer", MANY)
    here.memory[:] = b"\xa5" * SLAB_BYTES
    remote.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout, match="0 of 8 regions came in time") as caught:
        list(link.read(offer, MANY, timeout_s))
    link.close()
    return caught.value


def test_a_peer_that_was_killed_is_an_error_and_no_byte_changes(here, start):
    remote = start()
    remote.ask("fill", 2)
    link = here.connect(remote)
    offer = remote.ask("offer", MANY)
    here.memory[:] = b"\xa5" * SLAB_BYTES
    remote.signal(signal.SIGKILL)
    with pytest.raises(TransportError, match="the peer is gone") as lost:
        list(link.read(offer, MANY, 600))
    assert not isinstance(lost.value, TransferTimeout)
    assert stays_as_it_is(here)
    with pytest.raises(TransportError, match="the peer was lost"):
        list(link.read(offer, MANY, 20))


def test_a_peer_that_is_killed_between_two_regions_is_an_error(here, start):
    remote = start()
    link = here.connect(remote)
    reading = link.read(remote.ask("offer", MANY), MANY, 20)
    next(reading)
    remote.signal(signal.SIGKILL)
    with pytest.raises(TransportError, match="peer"):
        list(reading)
    assert stays_as_it_is(here)


def test_the_next_incarnation_of_a_peer_is_reached(here, start):
    for _ in range(2):
        remote = start()
        remote.ask("fill", 2)
        link = here.connect(remote)
        offer = remote.ask("offer", MANY)
        list(link.read(offer, MANY, 20))
        wanted = [remote.ask("checksum", *region) for region in MANY]
        assert [here.checksum(region) for region in MANY] == wanted
        remote.signal(signal.SIGKILL)
        with pytest.raises(TransportError):
            list(link.read(offer, MANY, 20))


def test_a_dead_peer_cannot_be_connected_to(here, start):
    remote = start()
    address = remote.ask("address")
    remote.signal(signal.SIGKILL)
    with pytest.raises(TransportError, match="gone"):
        here.connect_to(address, 20)


def test_a_peer_that_closed_its_transport_is_an_error(here, start):
    remote = start()
    link = here.connect(remote)
    offer, address = remote.ask("offer", MANY), remote.ask("address")
    remote.ask("close")
    with pytest.raises(TransportError, match="the peer is gone"):
        list(link.read(offer, MANY, 20))
    with pytest.raises(TransportError):
        here.connect_to(address, 20)


def test_a_stopped_peer_is_read_by_the_kernel_alone(here, start):
    remote = start()
    remote.ask("fill", 2)
    link = here.connect(remote)
    offer = remote.ask("offer", MANY)
    wanted = [remote.ask("checksum", *region) for region in MANY]
    remote.signal(signal.SIGSTOP)
    assert len(list(link.read(offer, MANY, 20))) == len(MANY)
    assert [here.checksum(region) for region in MANY] == wanted


def test_a_stopped_peer_cannot_be_connected_to(here, start):
    """Making contact takes its help. The place that its answer would go to is not the slab."""
    remote = start()
    address = remote.ask("address")
    remote.signal(signal.SIGSTOP)
    with pytest.raises(TransferTimeout, match="did not answer") as caught:
        here.connect_to(address, 0.3)
    assert caught.value.settled()
    remote.signal(signal.SIGCONT)
    eventually(lambda: not here.transport.in_flight())
    assert here.connect_to(address, 20).description == "CMA on one host"


def test_tcp_is_refused_unless_it_is_asked_for(monkeypatch, make_here, start):
    monkeypatch.setenv("UCX_TLS", "tcp")
    here, remote = make_here(), start()
    with pytest.raises(TransportError, match=r"UCX_TLS leaves it out on this and .* transport tcp"):
        here.connect(remote)


def test_tcp_that_ucx_falls_back_to_is_noticed(here, start):
    remote = start(ucx_tls="tcp")
    address = wire.decode_address(remote.ask("address"))
    claims = wire.encode(msgspec.structs.replace(address, cma=True))
    with pytest.raises(TransportError, match="the kernel allows it and UCX does not use it"):
        here.connect_to(claims)


def test_tcp_that_is_asked_for_works(over_tcp):
    here, remote = over_tcp
    link = here.connect(remote)
    assert link.description == "UCX over TCP"
    landed = list(link.read(remote.ask("offer", MANY), MANY, 20))
    assert sorted(number for number, _ in landed) == list(range(8))
    wanted = [remote.ask("checksum", *region) for region in MANY]
    assert [here.checksum(region) for region in MANY] == wanted


def test_what_comes_after_a_timeout_has_an_end(over_tcp):
    here, remote = over_tcp
    late = read_from_a_stalled_peer(here, remote)
    assert not late.settled()
    remote.signal(signal.SIGCONT)
    eventually(late.settled)
    assert stays_as_it_is(here)


def test_what_a_timeout_left_behind_outlives_its_error(over_tcp):
    here, remote = over_tcp
    read_from_a_stalled_peer(here, remote)
    remote.signal(signal.SIGCONT)
    eventually(lambda: not here.transport.in_flight())
    link = here.connect(remote)
    assert len(list(link.read(remote.ask("offer", MANY), MANY, 20))) == 8


def test_what_was_not_begun_before_a_timeout_never_comes(over_tcp):
    here, remote = over_tcp
    late = read_from_a_stalled_peer(here, remote)
    remote.signal(signal.SIGCONT)
    eventually(late.settled)
    wanted = [remote.ask("checksum", *region) for region in MANY]
    same = [here.checksum(region) == each for region, each in zip(MANY, wanted, strict=True)]
    assert same == [True] * 4 + [False] * 4
    last = MANY[-1]
    assert set(here.memory[last.offset : last.offset + last.nbytes]) == {0xA5}


def test_an_iterator_that_is_dropped_leaves_nothing_under_way_unsaid(over_tcp):
    here, remote = over_tcp
    link = here.connect(remote)
    sizes = [4096, 17 << 20, 17 << 20, 17 << 20]
    reading = link.read(remote.ask("offer", regions(sizes)), regions(sizes), 1.0)
    next(reading)
    remote.signal(signal.SIGSTOP)
    settled = lambda: True  # noqa: E731
    try:
        reading.close()
    except TransferTimeout as late:
        settled = late.settled
    remote.signal(signal.SIGCONT)
    eventually(settled)
    assert stays_as_it_is(here)


def test_a_stalled_peer_that_dies_settles_what_was_under_way(over_tcp):
    here, remote = over_tcp
    late = read_from_a_stalled_peer(here, remote)
    remote.signal(signal.SIGKILL)
    eventually(late.settled)
    assert stays_as_it_is(here)


def test_closing_the_transport_settles_all(over_tcp):
    here, remote = over_tcp
    late = read_from_a_stalled_peer(here, remote)
    here.transport.close()
    assert late.settled()
    remote.signal(signal.SIGCONT)
    assert stays_as_it_is(here)


def test_closing_the_transport_ends_a_read_that_waits(over_tcp):
    here, remote = over_tcp
    link = here.connect(remote)
    offer = remote.ask("offer", MANY)
    remote.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(link.read(offer, MANY, 25)))
        eventually(here.transport.in_flight)
        here.transport.close()
        with pytest.raises(TransportError, match="closed"):
            reading.result(20)


def test_closing_the_link_waits_for_what_is_under_way(over_tcp):
    here, remote = over_tcp
    link = here.connect(remote)
    offer = remote.ask("offer", MANY)
    remote.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(link.read(offer, MANY, 25)))
        eventually(here.transport.in_flight)
        link.close()
        assert not reading.done()
        remote.signal(signal.SIGCONT)
        with pytest.raises(TransportError, match="link is closed"):
            reading.result(20)
    assert stays_as_it_is(here)


def test_two_hosts_with_rdma_would_use_it(monkeypatch, make_here, start):
    """As far as this goes without a device: what is said is RDMA where both sides have it."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(rdma, "active_devices", lambda: ("mlx5_0",))
    here, remote = make_here(), start()
    with pytest.raises(TransportError, match="no RDMA: the peer's side has no active device"):
        here.connect(remote)
