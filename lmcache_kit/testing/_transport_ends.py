"""Tests of the end of a transport: closing twice, from other threads, during reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import Link
from lmcache_kit.testing._transport_failures import MakeWire, TransportTests
from lmcache_kit.testing.hosts import Host, MakeTransport, Stall

_NBYTES = 200_000


class EndingTests(TransportTests):
    """Part of :class:`~lmcache_kit.testing.TransportSuite`: closing."""

    def test_closing_twice_is_fine(self, source: Host, sink: Host, link: Link) -> None:
        for each in (link, link, sink.transport, sink.transport, link, source.transport):
            self.within(each.close, what="close()")

    def test_a_closed_link_reads_nothing(self, source: Host, sink: Host, link: Link) -> None:
        offer, into = source.offer(source.filled(_NBYTES)), sink.allocate(_NBYTES)
        link.close()
        error = self.fails(link, offer, into, what="reading by a closed link")
        assert isinstance(error, TransportError)
        assert sink.is_empty(), "the read failed, and bytes were written"

    def test_a_closed_transport_connects_to_nobody(self, source: Host, sink: Host) -> None:
        address = source.transport.address()
        sink.transport.close()
        with pytest.raises(TransportError):
            self.within(
                lambda: sink.transport.connect(address, source.dial, self.timeout_s),
                what="connecting with a closed transport",
            )

    def test_a_closed_transport_serves_nobody(self, source: Host) -> None:
        source.transport.close()
        with source.dial(self.timeout_s) as connection:
            connection.settimeout(self.timeout_s)
            try:
                assert connection.recv(1) == b""
            except ConnectionError:
                pass
            except TimeoutError:
                pytest.fail("serve() of a closed transport keeps the connection open")

    def test_a_peer_that_closed_is_an_error_in_time(
        self, source: Host, sink: Host, wire: MakeWire
    ) -> None:
        link = sink.link_to(source)
        offer, into = source.offer(source.filled(_NBYTES)), sink.allocate(_NBYTES)
        source.transport.close()
        error = self.fails(link, offer, into, what="reading from a peer that closed")
        assert isinstance(error, TransportError)
        assert not isinstance(error, TransferTimeout), "the read waited for a peer that is gone"

    def test_a_peer_that_closes_ends_the_read(
        self, source: Host, sink: Host, wire: MakeWire
    ) -> None:
        """The peer closes while bytes are in flight."""
        stall = Stall(_NBYTES)
        link = sink.link_to(source, wire(stall).dial)
        offer, into = source.offer(source.filled(*[_NBYTES] * 20)), sink.allocate(*[_NBYTES] * 20)

        def close() -> None:
            stall.reached.wait(self.timeout_s)
            source.transport.close()
            stall.go_on.set()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        try:
            error = self.fails(link, offer, into, what="reading from a peer that closes")
        finally:
            stall.go_on.set()
        closing.join(self.timeout_s)
        assert isinstance(error, TransportError)

    @pytest.mark.parametrize("which", ["link", "transport"])
    def test_closing_from_another_thread_ends_a_read(
        self, source: Host, sink: Host, wire: MakeWire, which: str
    ) -> None:
        stall = Stall(_NBYTES + _NBYTES // 2)
        link = sink.link_to(source, wire(stall).dial)
        offer, into = source.offer(source.filled(*[_NBYTES] * 2)), sink.allocate(*[_NBYTES] * 2)
        closed: list[bool] = []

        def close() -> None:
            stall.reached.wait(self.timeout_s)
            (link.close if which == "link" else sink.transport.close)()
            closed.append(True)

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        try:
            reading = link.read(offer, into, 3 * self.timeout_s)
            with pytest.raises(TransportError):
                self.within(lambda: list(reading), what="a read whose link was closed")
            closing.join(self.timeout_s)
            assert closed, "close() has not ended"
        finally:
            stall.go_on.set()

    def test_closing_while_threads_read_ends_them_all(self, source: Host, sink: Host) -> None:
        offer = source.offer(source.filled(*[100_000] * 4))
        reading = threading.Barrier(4)
        ends: list[BaseException] = []

        def work() -> None:
            link, into = sink.link_to(source), sink.allocate(*[100_000] * 4)
            reading.wait(self.timeout_s)
            try:
                while True:
                    list(link.read(offer, into, self.timeout_s))
            except Exception as error:  # noqa: BLE001 - checked below
                ends.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        reading.wait(self.timeout_s)
        self.within(sink.transport.close, what="close() while three threads read")
        for thread in threads:
            thread.join(self.timeout_s)
        assert [type(error) for error in ends if not isinstance(error, TransportError)] == []
        assert len(ends) == 3, f"{3 - len(ends)} of three threads still read"

    def test_closing_gives_everything_back(
        self, make_transport: MakeTransport, new_host: Callable[[], Host]
    ) -> None:
        def life() -> tuple[int, int]:
            hosts = [Host(make_transport, 1 << 20, self.timeout_s) for _ in range(2)]
            link = hosts[1].link_to(hosts[0])
            offered, into = hosts[0].filled(5000), hosts[1].allocate(5000)
            list(link.read(hosts[0].offer(offered), into, self.timeout_s))
            left = [name for host in hosts for name in host.close()]
            assert left == [], f"still running after close(): {', '.join(left)}"
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        life()
        before = life()
        after = [life() for _ in range(3)][-1]
        assert after[0] <= before[0], f"open descriptors grew from {before[0]} to {after[0]}"
        assert after[1] <= before[1], f"threads grew from {before[1]} to {after[1]}"
