"""The transport tcp, and many that are made of it and are wrong in one thing each.

``CAUGHT_BY``: the check of the suite that is there for it.
"""

from __future__ import annotations

import itertools
import os
import threading
import time

import msgspec
import pytest
from lmcache_kit_tcp_transport import wire
from lmcache_kit_tcp_transport.link import TcpLink
from lmcache_kit_tcp_transport.offers import Offers
from lmcache_kit_tcp_transport.serving import answer_all
from lmcache_kit_tcp_transport.transport import TcpTransport

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Link, ReadResult
from lmcache_kit.testing import TransportSuite

Right = TcpTransport


class Through(Link):
    """A link that does what another one does."""

    def __init__(self, link, transport):
        self.link = link
        self.transport = transport
        self.memory = transport.memory

    @property
    def description(self):
        return self.link.description

    def read(self, offer, into, timeout_s):
        yield from self.link.read(offer, into, timeout_s)

    def close(self):
        self.link.close()


class Linked(TcpTransport):
    """Its links are of its class ``Through``."""

    Through = Through

    def __init__(self, memory, host):
        super().__init__(memory, host)
        self.memory = memory

    def connect(self, address, dial, timeout_s):
        return self.Through(super().connect(address, dial, timeout_s), self)


class SwapsRegions(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            if len(into) > 1 and into[0].nbytes == into[1].nbytes:
                into = [into[1], into[0], *into[2:]]
            yield from self.link.read(offer, into, timeout_s)


class NamesTooEarly(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            reading = self.link.read(offer, into, timeout_s)
            for number in range(len(into)):
                yield ReadResult(number)
            yield from itertools.islice(reading, len(into), None)


class NamesTwice(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            for landed in self.link.read(offer, into, timeout_s):
                yield landed
                yield landed


class ForgetsTheLast(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            yield from list(self.link.read(offer, into, timeout_s))[:-1]


class WritesBeside(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            for landed in self.link.read(offer, into, timeout_s):
                offset, nbytes = into[landed.number]
                self.memory[offset + nbytes] ^= 1
                yield landed


class TrustsWhatItWasTold(TcpTransport):
    """Its checksums are of what was sent."""

    def connect(self, address, dial, timeout_s):
        link = super().connect(address, dial, timeout_s)
        link.__class__ = Trusting
        return link


class Trusting(TcpLink):
    told = 0

    def _frame(self, deadline):
        frame = super()._frame(deadline)
        self.told = frame.checksum
        return frame

    def _receive(self, number, region, deadline):
        super()._receive(number, region, deadline)
        return self.told


class IgnoresTheDeadline(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            yield from self.link.read(offer, into, timeout_s or 60)


class WritesAfterTheDeadline(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            try:
                yield from self.link.read(offer, into, timeout_s)
            except TransferTimeout:
                late = threading.Timer(0.03, self.write, [into[-1]])
                late.start()
                raise

        def write(self, region):
            self.memory[region.offset : region.offset + 8] = b"too late"


class NeverSettles(Linked):
    class Through(Through):
        def read(self, offer, into, timeout_s):
            try:
                yield from self.link.read(offer, into, timeout_s)
            except TransferTimeout as error:
                raise TransferTimeout("late", settled=lambda: False) from error


class LosesUnderConcurrency(TcpTransport):
    """All links land in one place first."""

    def __init__(self, memory, host):
        super().__init__(memory, host)
        self.memory = memory
        self.staging = memoryview(bytearray(len(memory)))
        self.stager = TcpTransport(self.staging, host)

    def connect(self, address, dial, timeout_s):
        return Staging(self.stager.connect(address, dial, timeout_s), self)

    def close(self):
        self.stager.close()
        super().close()


class Staging(Through):
    def read(self, offer, into, timeout_s):
        at, places = 0, []
        for region in into:
            places.append(region._replace(offset=at))
            if region.offset < 0 or region.offset + region.nbytes > len(self.memory):
                raise ValueError(f"{region} is outside")
            at += region.nbytes
        for landed in self.link.read(offer, places, timeout_s):
            time.sleep(0.0005)
            place, region = places[landed.number], into[landed.number]
            self.memory[region.offset : region.offset + region.nbytes] = self.transport.staging[
                place.offset : place.offset + place.nbytes
            ]
            yield landed


class ServesWhatWasWithdrawn(TcpTransport):
    def withdraw(self, offer):
        pass


class KnowsNoUnknownOffer(TcpTransport):
    def withdraw(self, offer):
        self._offers.withdraw(wire.unpack_offer(offer)[0])


class CanBeGuessed(TcpTransport):
    numbers = itertools.count()

    def __init__(self, memory, host):
        super().__init__(memory, host)
        count = lambda: next(self.numbers).to_bytes(wire.OFFER_TOKEN_BYTES, "little")  # noqa: E731
        self._offers = Offers(len(memory), count)


class OffersAnything(TcpTransport):
    def offer(self, regions):
        try:
            return super().offer(regions)
        except ValueError:
            return wire.pack_offer(os.urandom(wire.OFFER_TOKEN_BYTES), len(regions))


class FillsAnything(TcpTransport):
    """Python's slices do not mind."""

    def connect(self, address, dial, timeout_s):
        link = super().connect(address, dial, timeout_s)
        link.__class__ = Unchecking
        return link


class Unchecking(TcpLink):
    def _check(self, region):
        pass


class LeavesReadsAlone(Linked):
    class Through(Through):
        def close(self):
            pass


class LeavesAThread(TcpTransport):
    def __init__(self, memory, host):
        super().__init__(memory, host)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class RaisesForItsPeer(TcpTransport):
    def serve(self, connection):
        peer = connection
        try:
            peer = self._adopt(connection)
            answer_all(peer, self._memory, self._offers)
        except TransportError as error:
            if "starts no request" in str(error):
                raise
        finally:
            peer.close()


class RaisesItsLibrarysErrors(TcpTransport):
    def connect(self, address, dial, timeout_s):
        msgspec.msgpack.decode(address, type=wire.Address)
        return super().connect(address, dial, timeout_s)


class OnlySaysThatItEncrypts(TcpTransport):
    pass


CAUGHT_BY = {
    SwapsRegions: "test_regions_land_where_they_are_wanted",
    NamesTooEarly: "test_a_region_is_there_when_it_is_named",
    NamesTwice: "test_every_region_comes_whole_and_is_named_once",
    ForgetsTheLast: "test_every_region_comes_whole_and_is_named_once",
    WritesBeside: "test_bytes_beside_the_regions_stay_as_they_are",
    TrustsWhatItWasTold: "test_a_bit_that_changed_on_the_way_is_noticed",
    IgnoresTheDeadline: "test_no_time_is_a_timeout",
    WritesAfterTheDeadline: "test_a_peer_that_stalls_costs_no_more_than_the_deadline",
    NeverSettles: "test_a_peer_that_stalls_costs_no_more_than_the_deadline",
    LosesUnderConcurrency: "test_links_in_several_threads_do_not_disturb_each_other",
    ServesWhatWasWithdrawn: "test_a_withdrawn_offer_cannot_be_read",
    KnowsNoUnknownOffer: "test_withdrawing_what_is_no_offer_is_ignored",
    CanBeGuessed: "test_an_offer_cannot_be_guessed",
    OffersAnything: "test_regions_outside_our_memory_are_not_offered",
    FillsAnything: "test_regions_outside_our_memory_are_not_filled",
    LeavesReadsAlone: "test_closing_from_another_thread_ends_a_read",
    LeavesAThread: "test_closing_gives_everything_back",
    RaisesForItsPeer: "test_noise_ends_the_connection_it_comes_on_and_no_other",
    RaisesItsLibrarysErrors: "test_what_is_no_address_is_a_transport_error",
    OnlySaysThatItEncrypts: "test_nobody_on_the_way_can_read_the_bytes",
}


def suite_of(made):
    class Made(TransportSuite):
        timeout_s = 10.0 if made is Right else 1.0
        late_s = 0.12
        encrypts = made is OnlySaysThatItEncrypts

        @pytest.fixture
        def make_transport(self):
            return lambda memory: made(memory, "127.0.0.1")

    Made.__name__ = Made.__qualname__ = "TestRight" if made is Right else f"Test{made.__name__}"
    return Made


globals().update(
    {suite.__name__: suite for suite in map(suite_of, (Right, *CAUGHT_BY))},
)
