"""What is refused before NIXL is asked, and why."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmcache_kit_nixl_transport import wire

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces import ReadableRegion, Region
from lmcache_kit.interfaces.transport import MAX_ADDRESS_BYTES

from .conftest import SLAB_BYTES


def changed(remote, **fields) -> bytes:
    address = wire.decode_address(remote.ask("address"))
    return wire.encode(msgspec.structs.replace(address, **fields))


def test_an_address_is_small(owner):
    assert len(owner.ask("address")) < 2048


def test_one_host_is_reached_by_cma(here, owner):
    assert here.connect(owner).how == "CMA on one host"


def test_a_process_that_is_not_the_peer_is_noticed(here, owner):
    page = ctypes.create_string_buffer(wire.NONCE_BYTES)
    address = changed(owner, pid=os.getpid(), nonce=ctypes.addressof(page))
    with pytest.raises(TransportError, match=r"no CMA: .* is not the peer"):
        here.connect_to(address)


def test_a_pid_that_nobody_has_is_named(here, owner):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(TransportError, match=f"no CMA: .*{gone.pid}: No such process; it is gone"):
        here.connect_to(changed(owner, pid=gone.pid))


def test_memory_that_is_not_there_is_named(here, owner):
    with pytest.raises(TransportError, match=r"no CMA: .*Bad address"):
        here.connect_to(changed(owner, nonce=4096))


def test_a_peer_whose_ucx_may_not_use_cma_is_refused(here, owner):
    with pytest.raises(TransportError, match="UCX_TLS leaves it out on the peer's side"):
        here.connect_to(changed(owner, cma=False))


def test_another_host_without_rdma_is_refused(here, owner):
    with pytest.raises(TransportError, match="no CMA: it is on another host; no RDMA: this and"):
        here.connect_to(changed(owner, boot_id="elsewhere"))


def test_metadata_that_nixl_does_not_know_is_refused(here, owner):
    with pytest.raises(TransportError, match="address of this version of NIXL"):
        here.connect_to(changed(owner, metadata=bytes(453)))


def test_metadata_of_another_agent_is_refused(here, owner):
    with pytest.raises(TransportError, match="names one agent and leads to another"):
        here.connect_to(changed(owner, agent="0" * 32))
    assert here.connect(owner).how == "CMA on one host"


def test_a_peer_that_poses_as_another_is_refused(here, owner, start):
    link, other = here.connect(owner), wire.decode_address(start().ask("address"))
    name = wire.decode_address(owner.ask("address")).agent
    with pytest.raises(TransportError, match="two peers have the name"):
        here.connect_to(wire.encode(msgspec.structs.replace(other, agent=name)))
    link.close()


def test_memory_that_a_peer_only_says_it_has_is_not_read(here, owner):
    slab = wire.decode_address(owner.ask("address")).slab
    link = here.connect_to(changed(owner, slab=wire.Span(slab.address, SLAB_BYTES * 2)))
    offer = msgspec.msgpack.encode([(SLAB_BYTES - 100, 200)])
    with pytest.raises(TransportError, match="no such memory"):
        list(link.read(offer, [Region(0, 200)], 5))


def test_our_own_address_is_refused(here):
    with pytest.raises(TransportError, match="own"):
        here.connect_to(here.transport.address())


@given(st.binary(max_size=200))
def test_bytes_that_are_no_address_are_refused(data):
    with pytest.raises(TransportError, match="a peer's address cannot be decoded"):
        wire.decode_address(data)


def test_an_address_that_is_too_long_is_not_looked_at():
    with pytest.raises(TransportError, match="more than 65536"):
        wire.decode_address(bytes(MAX_ADDRESS_BYTES + 1))


@pytest.mark.parametrize("region", [(SLAB_BYTES, 1), (0, SLAB_BYTES + 1), (-1, 2), (0, -1)])
def test_what_we_do_not_have_is_not_offered(here, region):
    with pytest.raises(TransportError, match=r"region 1 .* outside this process's memory"):
        here.transport.offer([ReadableRegion(Region(0, 1), 0), ReadableRegion(Region(*region), 0)])


def test_an_offer_that_gets_too_long_is_refused(here):
    with pytest.raises(TransportError, match="an offer of 40000 regions takes"):
        here.transport.offer([ReadableRegion(Region(0, 1), 0)] * 40_000)


def test_withdrawing_is_heard_without_complaint(here):
    here.transport.withdraw(here.transport.offer([ReadableRegion(Region(0, 1), 0)]))
    here.transport.withdraw(b"never offered")


def test_a_connection_is_closed_at_once(here):
    import socket

    ours, theirs = socket.socketpair()
    here.transport.serve(theirs)
    assert ours.recv(1) == b""
    ours.close()
