"""Bytes of one process's slab in another's."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces import ReadResult, Region

from .conftest import SLAB_BYTES, regions

SIZES = [5, 4096, 0, 300_000, 3 << 20, 1, 9 << 20, 70_001]


def pull(here, owner, link, source, into):
    offer = owner.ask("offer", source)
    landed = list(link.read(offer, into, 20))
    wanted = [owner.ask("checksum", *region) for region in source]
    return landed, [here.checksum(region) for region in into] == wanted


def test_what_is_read_is_what_the_peer_has(here, owner):
    link = here.connect(owner)
    source = regions(SIZES)
    into = [Region(offset + 8192, nbytes) for offset, nbytes in source]
    landed, same = pull(here, owner, link, source, into)
    assert same
    assert sorted(landed) == [ReadResult(number) for number in range(len(SIZES))]


def test_bytes_beside_the_regions_stay_as_they_are(here, owner):
    link = here.connect(owner)
    here.memory[:] = b"\xa5" * SLAB_BYTES
    source = regions(SIZES, gap=64)
    list(link.read(owner.ask("offer", source), source, 20))
    gaps = [here.memory[region.offset + region.nbytes :][:64] for region in source]
    assert all(gap == b"\xa5" * 64 for gap in gaps)


def test_a_region_is_there_when_it_is_named(here, owner):
    link = here.connect(owner)
    source = regions([6 << 20] * 8)
    wanted = [owner.ask("checksum", *region) for region in source]
    for number, checksum in link.read(owner.ask("offer", source), source, 20):
        assert checksum is None
        assert here.checksum(source[number]) == wanted[number]


def test_a_region_is_named_before_the_next_ones_are_read(here, owner):
    link = here.connect(owner)
    source = regions([9 << 20] * 4)
    here.memory[:] = bytes(SLAB_BYTES)
    reading = link.read(owner.ask("offer", source), source, 20)
    assert next(reading).number == 0
    last = source[-1]
    assert not any(here.memory[last.offset : last.offset + 4096])
    reading.close()


def test_a_region_larger_than_one_transfer_is_named_once(start, make_here):
    size = 70 << 20
    here, owner = make_here(slab_bytes=size), start(size)
    owner.ask("fill", 3)
    link = here.connect(owner)
    landed, same = pull(here, owner, link, [Region(0, size)], [Region(0, size)])
    assert same
    assert landed == [ReadResult(0)]


def test_many_small_regions_arrive(here, owner):
    link = here.connect(owner)
    source = regions([9000] * 2000)
    landed, same = pull(here, owner, link, source[:300], source[1000:1300])
    assert same
    assert len(landed) == 300


def test_four_threads_read_by_links_of_their_own(here, owner):
    quarter = SLAB_BYTES // 4
    source = regions([700_000] * 6)
    offer = owner.ask("offer", source)
    wanted = [owner.ask("checksum", *region) for region in source]

    def work(thread: int) -> bool:
        into = [Region(offset + thread * quarter, nbytes) for offset, nbytes in source]
        link = here.connect_to(address)
        good = True
        for _ in range(40):
            for region in into:
                here.memory[region.offset : region.offset + 8] = bytes(8)
            list(link.read(offer, into, 20))
            good = good and [here.checksum(region) for region in into] == wanted
        link.close()
        return good

    address = owner.ask("address")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_four_threads_read_thousands_of_times(owner, start):
    """In a process of its own, which a race inside NIXL could kill."""
    sizes = [65536]
    source = regions(sizes)
    wanted = [owner.ask("checksum", *region) for region in source]
    offer = owner.ask("offer", source)
    got = start().ask("read_in_threads", owner.ask("address"), offer, sizes, 1000)
    assert got == [wanted] * 4


def test_a_peer_is_read_again_after_its_last_link_was_closed(here, owner):
    for _ in range(3):
        link = here.connect(owner)
        assert pull(here, owner, link, [Region(0, 5000)], [Region(64, 5000)])[1]
        link.close()
        link.close()


def test_two_processes_read_each_other(here, owner):
    link = here.connect(owner)
    here.memory[:4] = b"back"
    offer = here.offer(Region(0, 4))
    owner.ask("read", here.transport.address(), offer, [(100, 4)])
    assert owner.ask("checksum", 100, 4) == here.checksum(Region(0, 4))
    owner.ask("fill", 1)
    assert pull(here, owner, link, [Region(0, 5000)], [Region(64, 5000)])[1]


@pytest.mark.parametrize(
    ("source", "into", "message"),
    [
        ([(0, 100)], [(0, 99)], "whose sizes differ"),
        ([(0, 100)], [(0, 100), (100, 100)], "whose sizes differ"),
        ([(0, 100)], [(SLAB_BYTES - 50, 100)], "outside this process's memory"),
        ([(0, 100)], [(-50, 100)], "outside this process's memory"),
    ],
)
def test_what_does_not_fit_is_refused(here, owner, source, into, message):
    link = here.connect(owner)
    offer = owner.ask("offer", source)
    with pytest.raises(TransportError, match=message):
        link.read(offer, [Region(*each) for each in into], 5)


def test_an_offer_beyond_the_peers_memory_is_refused_by_the_reader(here, owner):
    link = here.connect(owner)
    offer = b"\x91\x92\x00\xce" + (SLAB_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(TransportError, match="outside the peer's memory"):
        link.read(offer, [Region(0, SLAB_BYTES)], 5)


@pytest.mark.parametrize(
    "offer",
    [
        b"",
        b"\xc1",
        b"\x91\x92\x00\xff",
        b"\x91\x01",
        b"\x91\x92\x00\xcf" + b"\xff" * 8,
        bytes(70_000),
    ],
)
def test_an_offer_that_means_nothing_is_refused(here, owner, offer):
    link = here.connect(owner)
    with pytest.raises(TransportError, match=r"offer|outside the peer's"):
        link.read(offer, [Region(0, 1)], 5)


def test_a_closed_link_reads_nothing(here, owner):
    link = here.connect(owner)
    offer = owner.ask("offer", [(0, 100)])
    link.close()
    with pytest.raises(TransportError, match="link is closed"):
        list(link.read(offer, [Region(0, 100)], 5))


def test_closing_a_link_ends_what_is_being_read(here, owner):
    link = here.connect(owner)
    source = regions([9 << 20] * 4)
    reading = link.read(owner.ask("offer", source), source, 20)
    next(reading)
    link.close()
    with pytest.raises(TransportError, match="link is closed"):
        list(reading)


def test_nothing_is_begun_past_the_deadline(here, owner):
    link = here.connect(owner)
    offer = owner.ask("offer", [(0, 100)])
    here.memory[:100] = bytes(100)
    reading = link.read(offer, [Region(0, 100)], 0)
    with pytest.raises(TimeoutError, match="0 of 1 regions"):
        next(reading)
    assert not any(here.memory[:100])


def test_no_regions_are_read_at_once(here, owner):
    link = here.connect(owner)
    assert list(link.read(owner.ask("offer", []), [], 5)) == []


def test_the_transport_closes_while_it_reads(make_here, owner):
    here = make_here()
    link = here.connect(owner)
    source = regions([1 << 20] * 32)
    offer = owner.ask("offer", source)

    def work() -> str:
        while True:
            try:
                list(link.read(offer, source, 20))
            except TransportError as error:
                return str(error)

    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(work)
        time.sleep(0)
        here.transport.close()
        assert "closed" in told.result(20)
    here.transport.close()
