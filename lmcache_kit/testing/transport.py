"""The suite of transports: reads that succeed; failures and ends are beside it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from lmcache_kit.interfaces import Link, Region, Transport
from lmcache_kit.interfaces.transport import MAX_ADDRESS_BYTES
from lmcache_kit.testing._bytes import Bytes
from lmcache_kit.testing._transport_ends import EndingTests
from lmcache_kit.testing._transport_failures import FailingTests
from lmcache_kit.testing.hosts import Host

SIZES = (5, 4096, 300_000, 1, 2 << 20, 70_001)


class TransportSuite(FailingTests, EndingTests):
    """Conformance of a :class:`~lmcache_kit.interfaces.Transport`.

    Define the fixture ``make_transport``: a function from a writable ``memoryview`` to a new
    transport whose host is ``127.0.0.1``.

    ``one_sided``: the transport does not use the connection from ``dial``; tests that disturb that
    connection are skipped. ``hides_memory``: a peer can read offered regions only, and only while
    they are offered. ``encrypts``: bytes on the connection are encrypted.
    """

    def test_it_is_a_transport(self, source: Host, link: Link) -> None:
        assert isinstance(source.transport, Transport)
        assert isinstance(link, Link)

    def test_addresses_and_offers_are_short(self, source: Host) -> None:
        offer = source.offer(source.filled(*[1000] * 200))
        for name, said in (("address", source.transport.address()), ("offer", offer)):
            assert isinstance(said, bytes)
            assert len(said) <= MAX_ADDRESS_BYTES, f"an {name} of {len(said)} bytes"

    def test_a_link_says_what_it_goes_over(self, link: Link) -> None:
        assert isinstance(link.how, str)
        assert 0 < len(link.how) <= 80
        assert link.how.isprintable()

    def test_every_region_comes_whole_and_is_named_once(
        self, source: Host, sink: Host, link: Link
    ) -> None:
        offered = source.filled(*SIZES)
        self.read_all(source, offered, sink, link, sink.allocate(*SIZES))

    def test_a_region_is_there_when_it_is_named(self, source: Host, sink: Host, link: Link) -> None:
        sizes = [500_000] * 8
        offered, into = source.filled(*sizes), sink.allocate(*sizes)
        for number, checksum in link.read(source.offer(offered), into, self.timeout_s):
            wanted = source.checksum(offered[number])
            assert sink.checksum(into[number]) == wanted, f"region {number} was not there yet"
            assert checksum in (None, wanted), f"region {number} has another checksum"

    def test_regions_land_where_they_are_wanted(self, source: Host, sink: Host, link: Link) -> None:
        """Regions of one size, in another order on each side: only their bytes show a mix-up."""
        offered, into = source.filled(*[10_000] * 20), sink.allocate(*[10_000] * 20)
        random.Random(1).shuffle(offered)
        random.Random(2).shuffle(into)
        self.read_all(source, offered, sink, link, into)

    def test_bytes_beside_the_regions_stay_as_they_are(
        self, source: Host, sink: Host, link: Link
    ) -> None:
        sink.memory[:] = b"\xa5" * len(sink.memory)
        offered, into = source.filled(*SIZES), sink.allocate(*SIZES)
        list(link.read(source.offer(offered), into, self.timeout_s))
        for offset, nbytes in into:
            sink.memory[offset : offset + nbytes] = b"\xa5" * nbytes
        assert not bytes(sink.memory).strip(b"\xa5"), "bytes were written beside the regions"

    def test_the_source_stays_as_it_is(self, source: Host, sink: Host, link: Link) -> None:
        offered = source.filled(*SIZES)
        before = Bytes(source.memory)
        self.read_all(source, offered, sink, link, sink.allocate(*SIZES))
        assert Bytes(source.memory) == before

    def test_many_small_regions_come(self, source: Host, sink: Host, link: Link) -> None:
        offered = source.filled(*[1500] * 500)
        self.read_all(source, offered, sink, link, sink.allocate(*[1500] * 500))

    def test_a_large_region_comes(self, source: Host, sink: Host, link: Link) -> None:
        nbytes = 5 << 20
        self.read_all(source, source.filled(nbytes), sink, link, sink.allocate(nbytes))

    def test_a_link_serves_one_move_after_another(
        self, source: Host, sink: Host, link: Link
    ) -> None:
        for seed in range(10):
            offered = source.filled(100_000, 3, seed=seed)
            self.read_all(source, offered, sink, link, sink.allocate(100_000, 3))

    def test_what_is_read_is_what_is_there_now(self, source: Host, sink: Host, link: Link) -> None:
        [region], [into] = source.filled(50_000), sink.allocate(50_000)
        for seed in range(5):
            source.memory[region.offset : region.offset + 50_000] = random.Random(seed).randbytes(
                50_000
            )
            self.read_all(source, [region], sink, link, [into])

    def test_an_offer_can_be_read_again(self, source: Host, sink: Host, link: Link) -> None:
        offered = source.filled(50_000)
        offer = source.offer(offered)
        for _ in range(3):
            [into] = sink.allocate(50_000)
            list(link.read(offer, [into], self.timeout_s))
            assert sink.bytes_of(into) == source.bytes_of(offered[0])

    def test_offers_are_told_apart(self, source: Host, sink: Host, link: Link) -> None:
        regions = [source.filled(5000, seed=seed) for seed in range(8)]
        offers = [source.offer(each) for each in regions]
        for number in (3, 0, 7, 3):
            [into] = sink.allocate(5000)
            list(link.read(offers[number], [into], self.timeout_s))
            assert sink.bytes_of(into) == source.bytes_of(regions[number][0])

    def test_links_in_several_threads_do_not_disturb_each_other(
        self, source: Host, sink: Host
    ) -> None:
        sizes = [60_000, 7, 300_000]
        begin = threading.Barrier(4)
        jobs = [(source.filled(*sizes, seed=seed), sink.allocate(*sizes)) for seed in range(4)]

        def work(job: tuple[list[Region], list[Region]]) -> None:
            link = sink.link_to(source)
            begin.wait(self.timeout_s)
            for _ in range(15):
                for offset, nbytes in job[1]:
                    sink.memory[offset : offset + nbytes] = bytes(nbytes)
                self.read_all(source, job[0], sink, link, job[1])
            link.close()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, jobs))

    def test_both_sides_read_at_once(self, source: Host, sink: Host) -> None:
        ways = [(source, sink, sink.link_to(source)), (sink, source, source.link_to(sink))]

        def work(way: tuple[Host, Host, Link]) -> None:
            theirs, ours, link = way
            offered, into = theirs.filled(200_000), ours.allocate(200_000)
            for _ in range(10):
                self.read_all(theirs, offered, ours, link, into)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, ways))

    def test_both_sides_connect_at_once(self, source: Host, sink: Host) -> None:
        begin = threading.Barrier(2)

        def work(pair: tuple[Host, Host]) -> None:
            theirs, ours = pair
            offered, into = theirs.filled(5000), ours.allocate(5000)
            begin.wait(self.timeout_s)
            self.read_all(theirs, offered, ours, ours.link_to(theirs), into)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, [(source, sink), (sink, source)]))

    def test_a_peer_is_reached_again_after_its_link_was_closed(
        self, source: Host, sink: Host
    ) -> None:
        for _ in range(3):
            link = sink.link_to(source)
            self.read_all(source, source.filled(5000), sink, link, sink.allocate(5000))
            link.close()
            link.close()

    def read_all(
        self, source: Host, offered: list[Region], sink: Host, link: Link, into: list[Region]
    ) -> None:
        """Read and compare all regions, and withdraw the offer."""
        offer = source.offer(offered)
        landed = list(link.read(offer, into, self.timeout_s))
        source.transport.withdraw(offer)
        numbers = sorted(each.number for each in landed)
        assert numbers == list(range(len(into))), "not each region was reported once"
        for number, checksum in landed:
            wanted = source.bytes_of(offered[number])
            assert sink.bytes_of(into[number]) == wanted, f"region {number} has other bytes"
            assert checksum in (None, source.checksum(offered[number]))
