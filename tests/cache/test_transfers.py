"""Chunks that leave one engine for another, without a network between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from lmcache_kit.cache.descriptors import (
    ChunkDescriptor,
    DeleteResult,
    Encoding,
    NamespaceInfo,
    Reservation,
)
from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.records import Extent, StoreItem
from lmcache_kit.errors import PluginNotFound
from lmcache_kit.interfaces.codec import ChunkInfo, Codec
from lmcache_kit.keys import chain, chunk_key, pack_tokens
from lmcache_kit.layout import KVLayout

NAMESPACE = bytes(range(32))
CHUNK = 4
MakeEngine = Callable[..., CacheEngine]
LAYOUT = KVLayout("float16", 1, 1, 5)


class Time(Protocol):
    now: float


def no_codec(name: str) -> Codec:
    raise PluginNotFound(f"no codec {name!r} is installed")


def store(engine: CacheEngine, tokens: Sequence[int], nbytes: int = 100) -> None:
    packed = pack_tokens(tokens)
    items = [
        StoreItem(link.parent, packed[link.start * 4 : link.end * 4], nbytes, link.start)
        for link in chain(NAMESPACE, packed, CHUNK)
    ]
    grants = engine.allocate(NAMESPACE, 0, 1, CHUNK, items, "worker")
    written = [(grant.ticket, 7) for grant in grants if grant.status == "granted"]
    assert engine.commit(written, "worker") == len(written)


def hit(engine: CacheEngine, tokens: Sequence[int]) -> int:
    match = engine.lookup(NAMESPACE, pack_tokens(tokens), CHUNK, 1, "scheduler")
    engine.release(match.lease, None)
    return match.chunks[-1].end if match.chunks else 0


def keys(tokens: Sequence[int]) -> list[bytes]:
    return [link.key for link in chain(NAMESPACE, pack_tokens(tokens), CHUNK)]


def receive(
    engine: CacheEngine, source: CacheEngine, tokens: Sequence[int], owner: str = "move"
) -> list[Reservation]:
    """Room for what the source lends of a prompt."""
    lease, descriptors = source.transfers.lease(keys(tokens), "peer")
    spaces = {space.digest: space for space in source.memory_tier.namespaces([NAMESPACE])}
    reservations = engine.transfers.reserve(descriptors, spaces, owner, no_codec)
    source.release(lease, None)
    return reservations


def one(**changes: object) -> ChunkDescriptor:
    """A descriptor of four tokens that is all right."""
    packed = pack_tokens([1, 2, 3, 4])
    descriptor = ChunkDescriptor(
        chunk_key(NAMESPACE, NAMESPACE[:16], packed),
        NAMESPACE,
        NAMESPACE[:16],
        packed,
        0,
        (Extent(0, 40, 7),),
    )
    return descriptor._replace(**changes)


NAMESPACES = {NAMESPACE: NamespaceInfo(NAMESPACE, CHUNK, 1, ())}


def test_what_is_lent_stays_until_it_is_given_back(make_engine: MakeEngine) -> None:
    engine = make_engine(300)
    store(engine, range(8))
    lease, descriptors = engine.transfers.lease(keys(range(8)), "peer")
    assert [descriptor.nbytes for descriptor in descriptors] == [100, 100]
    store(engine, range(100, 108))
    assert hit(engine, range(8)) == 8
    engine.release(lease, None)
    store(engine, range(200, 208))
    assert hit(engine, range(8)) < 8


def test_what_was_lent_comes_back_when_the_peer_dies_or_after_its_time(
    make_engine: MakeEngine, clock: Time
) -> None:
    engine = make_engine()
    store(engine, range(8))
    engine.transfers.lease(keys(range(8)), "peer")
    engine.drop_owner("peer")
    assert engine.stats()["leases"] == 0
    engine.transfers.lease(keys(range(8)), "peer")
    clock.now += 101
    assert engine.expire() == 1


def test_what_is_not_here_cannot_be_lent(make_engine: MakeEngine) -> None:
    assert make_engine().transfers.lease(keys(range(8)), "peer") == (0, [])


def test_a_descriptor_is_found_only_once_it_has_landed(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine()
    store(source, range(8))
    reservations = receive(goal, source, range(8))
    assert [reservation.status for reservation in reservations] == ["granted", "granted"]
    assert hit(goal, range(8)) == 0
    assert goal.stats()["pending"] == 2
    for reservation in reservations:
        assert goal.transfers.commit(reservation.ticket)
    assert hit(goal, range(8)) == 8
    assert goal.stats()["pending"] == 0
    assert goal.stats()["moved_in_bytes_total"] == 200


def test_a_descriptor_that_is_discarded_leaves_no_trace(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine()
    store(source, range(8))
    for reservation in receive(goal, source, range(8)):
        goal.transfers.abort(reservation.ticket)
        goal.transfers.abort(reservation.ticket)
        assert not goal.transfers.commit(reservation.ticket)
    assert goal.stats()["allocated_bytes"] == 0


def test_a_stranded_descriptors_memory_is_nobodys_until_it_is_discarded(
    make_engine: MakeEngine,
) -> None:
    source, goal = make_engine(), make_engine(300)
    store(source, range(4))
    [reservation] = receive(goal, source, range(4))
    assert goal.transfers.quarantine(reservation.ticket) == 100
    store(goal, range(4))
    store(goal, range(100, 112))
    assert goal.stats()["allocated_bytes"] == 300
    goal.transfers.abort(reservation.ticket)
    assert goal.stats()["allocated_bytes"] == 200
    assert not goal.transfers.commit(reservation.ticket)


def test_what_landed_does_not_leave_before_its_move_lets_go(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine(300)
    store(source, range(8))
    for reservation in receive(goal, source, range(8)):
        goal.transfers.commit(reservation.ticket)
    for start in range(100, 1000, 100):
        store(goal, range(start, start + 4))
    assert hit(goal, range(8)) == 8
    goal.memory_tier.references.release("move")
    for start in range(100, 1000, 100):
        store(goal, range(start, start + 4))
    assert hit(goal, range(8)) == 0


def test_a_chunk_that_is_here_is_kept_for_the_move_too(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine(300)
    store(source, range(4))
    store(goal, range(4))
    assert goal.memory_tier.references.acquire(keys(range(8)), "move") == keys(range(8))[1:]
    assert [reservation.status for reservation in receive(goal, source, range(4))] == ["present"]
    for start in range(100, 1000, 100):
        store(goal, range(start, start + 4))
    assert hit(goal, range(4)) == 4


def test_a_chunk_that_a_worker_stores_just_now_is_left_to_it(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine()
    store(source, range(4))
    item = StoreItem(NAMESPACE[:16], pack_tokens(range(4)), 100)
    [grant] = goal.allocate(NAMESPACE, 0, 1, CHUNK, [item], "worker")
    assert [reservation.status for reservation in receive(goal, source, range(4))] == ["storing"]
    assert goal.commit([(grant.ticket, 7)], "worker") == 1


def test_after_one_without_room_none_has_any(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine(250)
    store(source, range(12))
    store(source, range(12, 16), nbytes=20)
    reservations = receive(goal, source, range(12))
    assert [reservation.status for reservation in reservations] == ["granted", "granted", "full"]


def test_only_what_is_behind_no_gap_has_arrived(make_engine: MakeEngine) -> None:
    source, goal = make_engine(), make_engine()
    store(source, range(12))
    first, second, third = receive(goal, source, range(12))
    goal.transfers.commit(first.ticket)
    goal.transfers.abort(second.ticket)
    goal.transfers.commit(third.ticket)
    assert goal.memory_tier.references.findable("move", keys(range(12))) == keys(range(4))
    goal.drop_corrupt(keys(range(4))[0])
    assert goal.memory_tier.references.findable("move", keys(range(12))) == []


def test_what_is_pinned_followed_or_moving_is_not_deleted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    store(engine, range(8))
    store(engine, range(100, 108))
    store(engine, range(200, 204))
    engine.memory_tier.pin([NAMESPACE], pack_tokens(range(100, 104)), "p")
    engine.memory_tier.references.acquire(keys(range(200, 204)), "another move")
    asked = [*keys(range(4)), *keys(range(100, 108)), *keys(range(200, 204)), bytes(16)]
    assert engine.memory_tier.delete(asked) == DeleteResult(1, pinned=1, followed=1, in_use=1)
    assert [hit(engine, range(s, s + 8)) for s in (0, 100, 200)] == [8, 4, 4]
    assert engine.memory_tier.delete(keys(range(8))) == DeleteResult(2)
    assert hit(engine, range(8)) == 0


def test_a_chunk_whose_bytes_changed_goes_when_it_is_looked_at_again(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    store(engine, range(4))
    assert engine.transfers.recheck([*keys(range(4)), bytes(16)]) == 1
    assert hit(engine, range(4)) == 0
    assert engine.stats()["corrupt_total"] == 1


def test_an_encoded_descriptor_counts_as_encoded_and_goes_as_one(make_engine: MakeEngine) -> None:
    class Echo(Codec):
        format_version = 3

        def encode(self, payload: object, chunk: ChunkInfo) -> bytes:
            raise NotImplementedError

        decode = describe = max_blob_bytes = encode  # type: ignore[assignment]

    goal = make_engine()
    encoding = Encoding("echo", 3, (ChunkInfo(LAYOUT, 4),))
    [reservation] = goal.transfers.reserve(
        [one(encoding=encoding)], NAMESPACES, "move", lambda _: Echo()
    )
    goal.transfers.commit(reservation.ticket)
    assert goal.stats()["encoded_chunks"] == 1
    goal.memory_tier.clear()
    assert goal.stats()["encoded_chunks"] == 0
    assert goal.stats()["allocated_bytes"] == 0
    old = encoding._replace(version=2)
    [reservation] = goal.transfers.reserve(
        [one(encoding=old)], NAMESPACES, "move", lambda _: Echo()
    )
    assert (reservation.status, "version 2 of echo's format" in reservation.why) == ("unfit", True)


@pytest.mark.parametrize(
    "change",
    [
        {"key": bytes(16)},
        {"tokens": pack_tokens([1, 2, 3])},
        {"tokens": b"odd"},
        {"tokens": b""},
        {"tokens": pack_tokens(range(5))},
        {"parent": b"short"},
        {"extents": ()},
        {"extents": (Extent(0, 40, 7), Extent(0, 40, 7))},
        {"extents": (Extent(0, 0, 7),)},
        {"extents": (Extent(0, -4, 7),)},
        {"namespace": bytes(32)},
        {"encoding": Encoding("echo", 1, ())},
        {"encoding": Encoding("echo", 1, (ChunkInfo(LAYOUT, 4),))},
    ],
    ids=str,
)
def test_a_descriptor_that_is_not_what_it_says_is_not_taken(
    make_engine: MakeEngine, change: dict[str, object]
) -> None:
    goal = make_engine()
    [reservation] = goal.transfers.reserve([one(**change)], NAMESPACES, "move", no_codec)
    assert reservation.status == "unfit"
    assert reservation.why
    assert goal.stats()["allocated_bytes"] == 0
    [reservation] = goal.transfers.reserve([one()], NAMESPACES, "move", no_codec)
    assert reservation.status == "granted"


def test_a_namespace_of_another_shape_here_takes_no_chunk(make_engine: MakeEngine) -> None:
    goal = make_engine()
    store(goal, range(4))
    spaces = {NAMESPACE: NamespaceInfo(NAMESPACE, 8, 1, ())}
    [reservation] = goal.transfers.reserve([one()], spaces, "move", no_codec)
    assert reservation.status == "unfit"
    assert "chunk_size 4" in reservation.why
