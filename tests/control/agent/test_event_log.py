"""The event log of one location: numbers, history and snapshots."""

from __future__ import annotations

from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.protocol.control import Batch, PartialChunkEntry, Position, SnapshotPart
from tests.control.fakes import chunks_of


def send_all(log: EventLog) -> list[Batch | SnapshotPart]:
    sent = []
    while (message := log.next_message()) is not None:
        sent.append(message)
        log.mark_sent()
    return sent


CHUNKS = chunks_of(list(range(42)))


def test_changes_of_one_moment_are_one_batch_and_the_last_one_counts() -> None:
    log = EventLog("ram")
    first, second, *_ = CHUNKS
    log.added(first)
    log.added(second)
    log.removed(first.key)
    log.flush()
    assert send_all(log) == [Batch("ram", 1, second.key, first.key)]
    xor = int.from_bytes(second.key[:8], "little")
    assert log.position() == Position("ram", 1, 1, xor)


def test_a_partial_chunk_is_sent_as_one() -> None:
    log = EventLog("ram")
    log.added(CHUNKS[-1])
    log.flush()
    (sent,) = send_all(log)
    assert sent.partial_chunks == (PartialChunkEntry(CHUNKS[-1].key, CHUNKS[-1].parent, 2),)


def test_large_changes_are_split() -> None:
    log = EventLog("ram", keys_per_message=4)
    for chunk in CHUNKS[:10]:
        log.added(chunk)
    log.flush()
    sent = send_all(log)
    assert [(message.seq, len(message.added) // 16) for message in sent] == [(1, 4), (2, 4), (3, 2)]


def test_the_history_is_sent_again_from_where_the_other_end_stands() -> None:
    log = EventLog("ram", keys_per_message=2)
    for chunk in CHUNKS[:6]:
        log.added(chunk)
    log.flush()
    send_all(log)
    log.replay(1)
    assert [message.seq for message in send_all(log)] == [2, 3]


def test_a_history_that_has_ended_becomes_a_snapshot() -> None:
    log = EventLog("ram", keys_per_message=2, max_history_keys=20)
    for chunk in CHUNKS[:6]:
        log.added(chunk)
    log.flush()
    log.replay(0)
    assert send_all(log) == []
    assert log.snapshot_needed
    assert log.position() is None
    log.load_snapshot(CHUNKS[:3])
    log.start_snapshot()
    sent = send_all(log)
    assert [(each.seq, each.part, each.last) for each in sent] == [(4, 0, False), (4, 1, True)]
    assert log.position().seq == 4


def test_changes_beyond_the_bound_are_dropped_and_become_a_snapshot() -> None:
    log = EventLog("ram", max_pending=3)
    for chunk in CHUNKS[:9]:
        log.added(chunk)
    log.flush()
    assert log.snapshot_needed
    assert log.dropped > 0
    log.load_snapshot(CHUNKS[:9])
    log.start_snapshot()
    log.added(CHUNKS[9])
    log.flush()
    assert [type(message) for message in send_all(log)] == [SnapshotPart, Batch]


def test_an_empty_cache_sends_an_empty_snapshot() -> None:
    log = EventLog("ram")
    log.request_snapshot()
    log.load_snapshot([])
    log.start_snapshot()
    assert send_all(log) == [SnapshotPart("ram", 1, 0, True, b"")]


def test_what_was_there_before_is_sent_as_a_snapshot() -> None:
    log = EventLog("ram")
    log.preload(CHUNKS[:2])
    log.replay(0)
    assert log.next_message() is None
    assert log.snapshot_needed


def test_changes_that_a_snapshot_includes_are_not_sent_again() -> None:
    log = EventLog("ram")
    log.request_snapshot()
    log.added(CHUNKS[0])
    log.load_snapshot(CHUNKS[:1])
    log.start_snapshot()
    log.flush()
    assert len(send_all(log)) == 1
    xor = int.from_bytes(CHUNKS[0].key[:8], "little")
    assert log.position() == Position("ram", 1, 1, xor)
