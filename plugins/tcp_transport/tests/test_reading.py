from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces import Link, ReadableRegion, ReadResult, Region

WAIT_S = 20.0


def fetch(link: Link, offer: bytes, sink: Any, sizes: list[int]) -> list[bytes]:
    """What was offered, by way of the sink's memory; the checksums are checked."""
    into = [sink.allocate(size) for size in sizes]
    landed = list(link.read(offer, into, WAIT_S))
    got = [sink.bytes_of(region) for region in into]
    assert landed == [ReadResult(i, xxh3_64_intdigest(each)) for i, each in enumerate(got)]
    return got


def test_what_was_offered_arrives_with_its_checksums(source: Any, sink: Any, link: Link) -> None:
    payloads = [os.urandom(n) for n in (1, 4096, 300_001)]
    assert fetch(link, source.offer(payloads), sink, [1, 4096, 300_001]) == payloads
    assert link.how == "TCP"


def test_it_arrives_over_plain_connections_and_over_tls(over: Callable[..., Any]) -> None:
    source, sink, link = over()
    payloads = [os.urandom(n) for n in (1, 3_000_000, 0, 17)]
    assert fetch(link, source.offer(payloads), sink, [1, 3_000_000, 0, 17]) == payloads
    assert link.how in ("TCP", "TLSv1.3 over TCP")


def test_thousands_of_small_regions_arrive(source: Any, sink: Any, link: Link) -> None:
    payloads = [os.urandom(n % 50) for n in range(3000)]
    assert fetch(link, source.offer(payloads), sink, [n % 50 for n in range(3000)]) == payloads


def test_a_region_that_fills_no_socket_buffer_arrives(new_host: Callable[..., Any]) -> None:
    source, sink = new_host(100 << 20), new_host(100 << 20)
    link = sink.link_to(source)
    payload = os.urandom(1 << 20) * 99 + b"end"
    assert fetch(link, source.offer([payload]), sink, [len(payload)]) == [payload]


def test_an_offer_of_nothing_is_read_to_its_end(source: Any, sink: Any, link: Link) -> None:
    assert fetch(link, source.offer([]), sink, []) == []
    assert fetch(link, source.offer([b"next"]), sink, [4]) == [b"next"]


def test_one_link_serves_one_read_after_another(source: Any, sink: Any, link: Link) -> None:
    offer = source.offer([b"again"])
    for _ in range(20):
        assert fetch(link, offer, sink, [5]) == [b"again"]


def test_links_of_several_threads_do_not_disturb_each_other(
    new_host: Callable[..., Any],
) -> None:
    source, sink = new_host(8 << 20), new_host(64 << 20)
    payloads = [os.urandom(1_000_000 + n) for n in range(4)]
    offers = [source.offer([payload]) for payload in payloads]
    regions = [[sink.allocate(len(payload)) for _ in range(10)] for payload in payloads]

    def read(number: int) -> None:
        link = sink.link_to(source)
        for region in regions[number]:
            list(link.read(offers[number], [region], WAIT_S))
        link.close()

    threads = [threading.Thread(target=read, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    for payload, into in zip(payloads, regions, strict=True):
        assert all(sink.bytes_of(region) == payload for region in into)


def test_nothing_outside_of_the_named_regions_changes(source: Any, sink: Any, link: Link) -> None:
    list(link.read(source.offer([b"x" * 100]), [Region(1000, 100)], WAIT_S))
    assert bytes(sink.memory) == bytes(1000) + b"x" * 100 + bytes(len(sink.memory) - 1100)


def test_an_offer_that_nobody_made_is_refused_and_the_link_goes_on(
    source: Any, sink: Any, link: Link
) -> None:
    offer = source.offer([b"real"])
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+ refuses: the offer is unknown"):
        fetch(link, bytes(16) + offer[16:], sink, [4])
    assert fetch(link, offer, sink, [4]) == [b"real"]


def test_a_withdrawn_offer_is_refused(source: Any, sink: Any, link: Link) -> None:
    offer = source.offer([b"gone"])
    source.transport.withdraw(offer)
    source.transport.withdraw(offer)
    with pytest.raises(TransportError, match="unknown or withdrawn"):
        fetch(link, offer, sink, [4])


def test_withdrawing_what_is_no_offer_does_nothing(source: Any) -> None:
    source.transport.withdraw(b"nonsense")


def test_an_offer_cannot_be_guessed(source: Any) -> None:
    offers = {source.offer([b"same"])[:16] for _ in range(100)}
    assert len(offers) == 100


def test_what_is_no_offer_is_said_to_be_none(sink: Any, link: Link) -> None:
    with pytest.raises(TransportError, match="3 bytes are no offer of the transport tcp"):
        fetch(link, b"abc", sink, [])


def test_asking_for_another_number_of_regions_is_an_error(
    source: Any, sink: Any, link: Link
) -> None:
    offer = source.offer([b"one", b"two"])
    with pytest.raises(TransportError, match="2 regions are offered, and 1 are requested"):
        fetch(link, offer, sink, [3])
    with pytest.raises(TransportError, match="refuses: 1 regions are requested, and 2 offered"):
        fetch(link, offer[:16] + (1).to_bytes(4, "big"), sink, [3])


def test_a_region_of_another_size_is_an_error_and_ends_the_link(
    source: Any, sink: Any, link: Link
) -> None:
    offer = source.offer([b"four"])
    with pytest.raises(TransportError, match="has 4 bytes; 5 were requested"):
        fetch(link, offer, sink, [5])
    assert not any(sink.memory)
    with pytest.raises(TransportError, match="closed on this side"):
        fetch(link, offer, sink, [4])


@pytest.mark.parametrize("region", [Region(-1, 1), Region(4 << 20, 1), Region(0, -1)])
def test_reading_to_outside_of_the_memory_is_an_error_before_anything_is_sent(
    source: Any, sink: Any, link: Link, region: Region
) -> None:
    with pytest.raises(ValueError, match="is not in the memory, which has 4194304 bytes"):
        list(link.read(source.offer([b"x"]), [region], WAIT_S))
    assert fetch(link, source.offer([b"fine"]), sink, [4]) == [b"fine"]


@pytest.mark.parametrize("region", [Region(-1, 1), Region((4 << 20) - 1, 2), Region(0, -1)])
def test_memory_that_there_is_not_cannot_be_offered(source: Any, region: Region) -> None:
    with pytest.raises(ValueError, match="is not in the memory, which has 4194304 bytes"):
        source.transport.offer([ReadableRegion(region, 0)])


def test_a_checksum_is_of_64_bits(source: Any) -> None:
    with pytest.raises(ValueError, match="is no xxh3-64"):
        source.transport.offer([ReadableRegion(Region(0, 1), 1 << 64)])


def test_giving_up_a_read_half_way_ends_the_link(source: Any, sink: Any, link: Link) -> None:
    offer = source.offer([b"one", b"two"])
    reading = link.read(offer, [sink.allocate(3), sink.allocate(3)], WAIT_S)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    with pytest.raises(TransportError, match="closed on this side"):
        list(link.read(offer, [Region(0, 3), Region(3, 3)], WAIT_S))
