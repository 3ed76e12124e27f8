"""Tests of refusals of a transport, and of its failures when peer or connection fail."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias

import pytest

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Link, ReadableRegion, Region
from lmcache_kit.testing._bytes import Bytes
from lmcache_kit.testing.hosts import Host, MakeTransport, Stall, Wire, cut, flip
from lmcache_kit.testing.suite import Suite

MakeWire: TypeAlias = Callable[[Callable[[int, bytes], bytes | None]], Wire]

_NBYTES = 200_000


class TransportTests(Suite):
    """Fixtures and helpers that the parts of the transports' suite share."""

    one_sided: ClassVar[bool] = False
    hides_memory: ClassVar[bool] = True
    encrypts: ClassVar[bool] = False

    memory_bytes: ClassVar[int] = 8 << 20
    """Memory of each of the two hosts."""
    late_s: ClassVar[float] = 0.3
    """A time-out that is meant to pass; long enough to connect within it."""

    @pytest.fixture
    def make_transport(self) -> MakeTransport:
        self.missing(
            "the fixture 'make_transport'",
            """
            @pytest.fixture
            def make_transport(self):
                return lambda memory: MyTransport(memory, "127.0.0.1")
            """,
        )

    @pytest.fixture
    def new_host(self, make_transport: MakeTransport) -> Iterator[Callable[[], Host]]:
        hosts: list[Host] = []

        def build() -> Host:
            hosts.append(Host(make_transport, self.memory_bytes, self.timeout_s))
            return hosts[-1]

        yield build
        # Close all hosts before any assertion, so that none is left for the next test.
        left = [name for host in hosts for name in host.close()]
        assert left == [], f"still running after close(): {', '.join(left)}"
        raised = [each for host in hosts for each in host.raised]
        assert raised == []

    @pytest.fixture
    def source(self, new_host: Callable[[], Host]) -> Host:
        return new_host()

    @pytest.fixture
    def sink(self, new_host: Callable[[], Host]) -> Host:
        return new_host()

    @pytest.fixture
    def link(self, source: Host, sink: Host) -> Link:
        return sink.link_to(source)

    @pytest.fixture
    def wire(self, source: Host) -> Iterator[MakeWire]:
        """Return a function that makes disturbed connections to the source."""
        if self.one_sided:
            pytest.skip("one_sided: bytes do not go over the dialled connection")
        wires: list[Wire] = []

        def build(change: Callable[[int, bytes], bytes | None]) -> Wire:
            wires.append(Wire(source, change))
            return wires[-1]

        yield build
        for each in wires:
            each.close()

    def fails(self, link: Link, offer: bytes, into: list[Region], *, what: str) -> Exception:
        """Return the TransportError of a read, or the ValueError of one that does not begin."""
        try:
            self.within(
                lambda: list(link.read(offer, into, self.timeout_s)),
                what=what,
                seconds=1.5 * self.timeout_s,
            )
        except (TransportError, ValueError) as error:
            return error
        pytest.fail(f"{what}: read as if nothing were wrong")


class FailingTests(TransportTests):
    """Part of :class:`~lmcache_kit.testing.TransportSuite`: refusals and failures."""

    # Offers that do not exist.

    def test_a_withdrawn_offer_cannot_be_read(self, source: Host, sink: Host, link: Link) -> None:
        self._needs_hidden_memory()
        offer, into = source.offer(source.filled(_NBYTES)), sink.allocate(_NBYTES)
        source.transport.withdraw(offer)
        error = self.fails(link, offer, into, what="reading a withdrawn offer")
        assert isinstance(error, TransportError)
        assert sink.is_empty(), "and something landed"

    def test_withdrawing_an_offer_leaves_the_others(
        self, source: Host, sink: Host, link: Link
    ) -> None:
        first, second = (source.filled(5000, seed=seed) for seed in (1, 2))
        gone, kept = source.offer(first), source.offer(second)
        source.transport.withdraw(gone)
        source.transport.withdraw(gone)
        [into] = sink.allocate(5000)
        list(link.read(kept, [into], self.timeout_s))
        assert sink.bytes_of(into) == source.bytes_of(second[0])

    @pytest.mark.parametrize("offer", [b"", b"\x00", b"no offer", bytes(20), b"\xff" * 300])
    def test_withdrawing_what_is_no_offer_is_ignored(self, source: Host, offer: bytes) -> None:
        source.transport.withdraw(offer)

    @pytest.mark.parametrize("seed", range(8))
    def test_what_is_no_offer_cannot_be_read(self, sink: Host, link: Link, seed: int) -> None:
        noise = random.Random(seed).randbytes([0, 1, 8, 16, 20, 40, 1000, 70_000][seed])
        error = self.fails(link, noise, sink.allocate(100), what=f"an offer of {len(noise)} bytes")
        assert isinstance(error, TransportError)
        assert sink.is_empty(), "and something landed"

    def test_an_offer_cannot_be_guessed(self, source: Host, sink: Host) -> None:
        """A peer that knows one offer cannot guess another one."""
        self._needs_hidden_memory()
        regions = source.filled(100)
        offers = [source.offer(regions) for _ in range(4)]
        assert len(set(offers)) == 4, "the same regions, the same offer"
        assert len(offers[0]) >= 16, f"an offer of {len(offers[0])} bytes can be guessed"
        for at in range(min(64, len(offers[0]))):
            for bit in (1, 2):
                guess = bytearray(offers[0])
                guess[at] ^= bit
                link = sink.link_to(source)
                self.fails(link, bytes(guess), sink.allocate(100), what="reading what was guessed")
                link.close()

    # Regions that do not fit.

    @pytest.mark.parametrize(
        "sizes",
        [(100,), (100, 200, 300), (100, 199), (101, 200), (200, 100), ()],
        ids=["fewer", "more", "shorter", "longer", "swapped", "none"],
    )
    def test_regions_of_other_number_or_size_are_refused(
        self, source: Host, sink: Host, link: Link, sizes: tuple[int, ...]
    ) -> None:
        offer = source.offer(source.filled(100, 200))
        into = sink.allocate(*sizes)
        with pytest.raises(TransportError):
            self.within(lambda: list(link.read(offer, into, self.timeout_s)), what="a misfit")
        for offset, nbytes in into:
            sink.memory[offset : offset + nbytes] = bytes(nbytes)
        assert sink.is_empty(), "something landed beside the regions"

    @pytest.mark.parametrize("offset", [-50, -100, 1, 1 << 62], ids=str)
    def test_regions_outside_our_memory_are_not_filled(
        self, source: Host, sink: Host, link: Link, offset: int
    ) -> None:
        if offset == 1:
            offset = len(sink.memory) - 50
        offer = source.offer(source.filled(100))
        self.fails(link, offer, [Region(offset, 100)], what=f"filling 100 bytes at {offset}")
        assert sink.is_empty(), "and something landed"

    @pytest.mark.parametrize("offset", [-50, 1, 1 << 62], ids=str)
    def test_regions_outside_our_memory_are_not_offered(self, source: Host, offset: int) -> None:
        if offset == 1:
            offset = len(source.memory) - 50
        with pytest.raises((TransportError, ValueError)):
            source.transport.offer([ReadableRegion(Region(offset, 100), 0)])

    def test_a_link_survives_a_refusal_or_says_that_it_is_over(
        self, source: Host, sink: Host, link: Link
    ) -> None:
        self._needs_hidden_memory()
        offered, [into] = source.filled(5000), sink.allocate(5000)
        gone = source.offer(offered)
        source.transport.withdraw(gone)
        self.fails(link, gone, [into], what="reading a withdrawn offer")
        try:
            list(link.read(source.offer(offered), [into], self.timeout_s))
        except TransportError:
            link.close()
            list(sink.link_to(source).read(source.offer(offered), [into], self.timeout_s))
        assert sink.bytes_of(into) == source.bytes_of(offered[0])

    # Peers that cannot be reached or do not answer.

    @pytest.mark.parametrize("seed", range(6))
    def test_what_is_no_address_is_a_transport_error(
        self, source: Host, sink: Host, seed: int
    ) -> None:
        noise = random.Random(seed).randbytes([0, 1, 10, 100, 1000, 64_000][seed])
        with pytest.raises(TransportError):
            self.within(
                lambda: sink.transport.connect(noise, source.dial, self.timeout_s),
                what=f"connecting to an address of {len(noise)} bytes of noise",
            )

    def test_a_peer_that_cannot_be_dialled_is_a_transport_error(
        self, source: Host, sink: Host, wire: MakeWire
    ) -> None:
        for error in (ConnectionRefusedError(111, "refused"), TransportError("another secret")):

            def dial(_: float, error: Exception = error) -> socket.socket:
                raise error

            with pytest.raises(TransportError, match=r"refused|secret"):
                sink.link_to(source, dial)

    def test_a_peer_that_says_nothing_costs_no_more_than_the_time_out(
        self, source: Host, sink: Host, wire: MakeWire
    ) -> None:
        stall = Stall(0)
        way = wire(stall)
        try:
            with pytest.raises(TransportError):
                self.within(
                    lambda: sink.transport.connect(
                        source.transport.address(), way.dial, self.late_s
                    ),
                    what=f"connecting within {self.late_s:g} s",
                )
        finally:
            stall.go_on.set()

    @pytest.mark.parametrize("nbytes", [0, 1, 31, 500, 100_000])
    def test_noise_ends_the_connection_it_comes_on_and_no_other(
        self, source: Host, sink: Host, link: Link, nbytes: int
    ) -> None:
        with source.dial(self.timeout_s) as noisy, contextlib.suppress(OSError):
            noisy.sendall(random.Random(nbytes).randbytes(nbytes))
            noisy.shutdown(socket.SHUT_WR)
            noisy.settimeout(self.timeout_s)
            while noisy.recv(1 << 16):
                pass
        offered, [into] = source.filled(5000), sink.allocate(5000)
        list(link.read(source.offer(offered), [into], self.timeout_s))
        assert sink.bytes_of(into) == source.bytes_of(offered[0])

    # Bad connections.

    @pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
    def test_a_bit_that_changed_on_the_way_is_noticed(
        self, source: Host, sink: Host, wire: MakeWire, share: float
    ) -> None:
        """The read fails, or its checksum is that of the changed bytes, so that readers see it."""
        [offered], [into] = source.filled(_NBYTES), sink.allocate(_NBYTES)
        way = wire(flip(int(share * _NBYTES)))
        with contextlib.suppress(TransportError):
            reading = sink.link_to(source, way.dial).read(
                source.offer([offered]), [into], self.timeout_s
            )
            for landed in self.within(lambda: list(reading), what="the read"):
                assert landed.checksum in (None, sink.checksum(into)), (
                    "the checksum is not that of the bytes in memory"
                )

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_a_connection_that_is_cut_ends_the_read(
        self, source: Host, sink: Host, wire: MakeWire, share: float
    ) -> None:
        offered, into = source.filled(_NBYTES, _NBYTES), sink.allocate(_NBYTES, _NBYTES)
        link = sink.link_to(source, wire(cut(int(share * 2 * _NBYTES))).dial)
        error = self.fails(link, source.offer(offered), into, what="reading over a cut line")
        assert isinstance(error, TransportError)
        assert not isinstance(error, TransferTimeout), "it did not notice before the deadline"

    def test_a_peer_that_stalls_costs_no_more_than_the_deadline(
        self, source: Host, sink: Host, wire: MakeWire
    ) -> None:
        """Once the error says that it is settled, no byte changes any more."""
        offered, into = source.filled(_NBYTES, _NBYTES), sink.allocate(_NBYTES, _NBYTES)
        stall = Stall(int(1.5 * _NBYTES))
        link = sink.link_to(source, wire(stall).dial)
        try:
            reading = link.read(source.offer(offered), into, self.late_s)
            with pytest.raises(TransferTimeout) as late:
                self.within(lambda: list(reading), what=f"a read within {self.late_s:g} s")
            self._until(late.value.settled, what="settled() to be true")
            before = Bytes(sink.memory)
        finally:
            stall.go_on.set()
        time.sleep(self.late_s / 3)  # no event marks the absence of a write
        assert Bytes(sink.memory) == before, "bytes were written after settled() was true"

    def test_no_time_is_a_timeout(self, source: Host, sink: Host, link: Link) -> None:
        offer, into = source.offer(source.filled(_NBYTES)), sink.allocate(_NBYTES)
        with pytest.raises(TransferTimeout) as late:
            self.within(lambda: list(link.read(offer, into, 0.0)), what="a read in no time")
        self._until(late.value.settled, what="settled() to be true")

    def test_nobody_on_the_way_can_read_the_bytes(
        self, source: Host, sink: Host, wire: MakeWire
    ) -> None:
        if not self.encrypts:
            pytest.skip("encrypts = False")
        [offered], [into] = source.filled(5000), sink.allocate(5000)
        way = wire(lambda _, data: data)
        list(sink.link_to(source, way.dial).read(source.offer([offered]), [into], self.timeout_s))
        assert sink.bytes_of(into) == source.bytes_of(offered)
        for at in range(0, 5000, 50):
            assert source.bytes_of(offered)[at : at + 50] not in way.said, "plain bytes on the wire"

    # Helpers.

    def _needs_hidden_memory(self) -> None:
        if not self.hides_memory:
            pytest.skip("hides_memory = False: peers can read all memory")

    def _until(self, holds: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"waited {self.timeout_s:g} s for {what}"
            time.sleep(0.005)
