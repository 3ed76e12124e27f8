"""The replica of one location: what was lost on the way, and how that is healed."""

from __future__ import annotations

from collections import Counter

import pytest

from lmcache_kit.controller import replica as module
from lmcache_kit.controller.key_index import KeyIndex, Owner
from lmcache_kit.controller.replica import MAX_BUFFERED, Replica
from lmcache_kit.errors import ProtocolError
from lmcache_kit.protocol.control import (
    Batch,
    Confirmed,
    PartialChunkEntry,
    Position,
    Resync,
    SnapshotPart,
)

KEYS = [bytes([i]) * 16 for i in range(1, 40)]
A, B, C, D = KEYS[:4]


class Ends:
    """A replica with an index of its own."""

    def __init__(self) -> None:
        self.index = KeyIndex()
        self.counts: Counter[str] = Counter()
        self.replica = Replica(self.index, Owner("a", "ram"), 2.0, self.counts)
        self.index.show(self.replica.holder)

    @property
    def visible(self) -> set[bytes]:
        return {key for key in KEYS if self.index.held(key)}


@pytest.fixture
def ends() -> Ends:
    return Ends()


def batch(seq: int, added: bytes = b"", removed: bytes = b"") -> Batch:
    return Batch("ram", seq, added, removed)


def part(seq: int, number: int, keys: bytes, *, last: bool) -> SnapshotPart:
    return SnapshotPart("ram", seq, number, last, keys)


def test_batches_apply_in_order(ends: Ends) -> None:
    assert ends.replica.batch(batch(1, A + B), 0) is None
    assert ends.replica.batch(batch(2, C, A), 0) is None
    assert ends.visible == {B, C}


def test_a_gap_is_asked_for_once_and_nothing_behind_it_is_taken(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    assert ends.replica.batch(batch(3, C), 0) == Resync("ram", 1, snapshot=False)
    assert ends.replica.batch(batch(4, D), 0.1) is None
    assert ends.visible == {A}
    assert ends.replica.batch(batch(5, D), 2.5) == Resync("ram", 1, snapshot=False)


def test_a_repeated_batch_changes_nothing(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    ends.replica.batch(batch(2, B, A), 0)
    assert ends.replica.batch(batch(1, A), 0) is None
    assert ends.visible == {B}


def test_a_heartbeat_ahead_of_the_index_asks_for_the_rest(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    assert ends.replica.check(Position("ram", 3, 1, 0), 0) == Resync("ram", 1, snapshot=False)


def test_a_digest_that_differs_asks_for_a_snapshot(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    xor = int.from_bytes(A[:8], "little")
    assert ends.replica.check(Position("ram", 1, 1, xor), 0) is None
    assert ends.replica.check(Position("ram", 1, 1, xor ^ 1), 0) == Resync("ram", 1, snapshot=True)
    assert ends.replica.check(Position("ram", 1, 2, xor), 9) == Resync("ram", 1, snapshot=True)


def test_a_heartbeat_behind_the_index_is_late_and_means_nothing(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    assert ends.replica.check(Position("ram", 0, 0, 0), 0) is None


def test_a_snapshot_is_seen_only_when_it_is_whole(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    ends.replica.snapshot(part(7, 0, B, last=False), 0)
    assert ends.visible == {A}
    ends.replica.snapshot(part(7, 1, C, last=True), 0)
    assert ends.visible == {B, C}
    assert ends.replica.seq == 7


def test_batches_during_a_snapshot_count_before_and_after_the_swap(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    ends.replica.snapshot(part(1, 0, A, last=False), 0)
    ends.replica.batch(batch(2, D), 0)
    assert ends.visible == {A, D}
    ends.replica.snapshot(part(1, 1, B, last=True), 0)
    assert ends.visible == {A, B, D}
    assert ends.replica.seq == 2


def test_more_batches_than_are_kept_during_a_snapshot_become_a_gap(ends: Ends) -> None:
    ends.replica.snapshot(part(1, 0, A, last=False), 0)
    for seq in range(2, MAX_BUFFERED + 10):
        ends.replica.batch(batch(seq, B), 0)
    ends.replica.snapshot(part(1, 1, b"", last=True), 0)
    last = MAX_BUFFERED + 1
    assert ends.replica.seq == last
    asked = ends.replica.batch(batch(last + 20, C), 0)
    assert asked == Resync("ram", last, snapshot=False)


def test_a_lost_part_starts_the_snapshot_over(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    ends.replica.snapshot(part(7, 0, B, last=False), 0)
    assert ends.replica.snapshot(part(7, 2, D, last=True), 0) == Resync("ram", 1, snapshot=True)
    assert ends.visible == {A}
    ends.replica.snapshot(part(8, 0, C, last=True), 0)
    assert ends.visible == {C}


def test_a_snapshot_that_goes_quiet_is_given_up(ends: Ends) -> None:
    ends.replica.snapshot(part(7, 0, B, last=False), 0)
    assert ends.replica.check(Position("ram", 9, 1, 1), 1.0) is None
    assert ends.replica.check(Position("ram", 9, 1, 1), 3.0) == Resync("ram", 0, snapshot=True)
    assert ends.index.holders == 1


def test_an_old_snapshot_does_not_bring_back_what_is_gone(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    ends.replica.batch(batch(2, B, A), 0)
    ends.replica.snapshot(part(1, 0, A, last=True), 0)
    assert ends.visible == {B}


@pytest.mark.parametrize(
    "entry",
    [
        PartialChunkEntry(b"", A, 1),
        PartialChunkEntry(A, b"short", 1),
        PartialChunkEntry(A, B, 0),
        PartialChunkEntry(A, B, -3),
    ],
)
def test_an_impossible_partial_chunk_is_refused_whole(ends: Ends, entry: PartialChunkEntry) -> None:
    with pytest.raises(ProtocolError, match="not a partial chunk"):
        ends.replica.batch(Batch("ram", 1, A, b"", (entry,)), 0)
    assert (ends.visible, ends.replica.seq) == (set(), 0)


def test_a_blob_that_is_no_whole_number_of_keys_is_refused_whole(ends: Ends) -> None:
    with pytest.raises(ProtocolError, match="a blob of 17 bytes"):
        ends.replica.batch(batch(1, A, A + b"x"), 0)
    assert ends.replica.seq == 0


# What the index is asked to confirm.


def test_what_is_held_is_confirmed(ends: Ends) -> None:
    assert ends.replica.confirm(0, 0) == Confirmed("ram", 0)
    ends.replica.batch(batch(1, A), 0)
    ends.replica.batch(batch(2, B), 0)
    assert ends.replica.confirm(1, 0) == Confirmed("ram", 1)
    assert ends.replica.confirm(2, 0) == Confirmed("ram", 2)


def test_what_is_missing_is_asked_for_at_once_and_confirmed_when_it_came(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    assert ends.replica.confirm(2, 0) == Resync("ram", 1, snapshot=False)
    assert ends.replica.confirm(2, 0.5) is None
    ends.replica.batch(batch(2, B), 0.6)
    assert ends.replica.confirm(2, 0.7) == Confirmed("ram", 2)


def test_a_snapshot_is_confirmed_when_it_is_whole(ends: Ends) -> None:
    ends.replica.snapshot(part(7, 0, B, last=False), 0)
    assert ends.replica.confirm(7, 0) is None
    ends.replica.snapshot(part(7, 1, C, last=True), 0)
    assert ends.replica.confirm(7, 0) == Confirmed("ram", 7)


def test_a_snapshot_that_goes_quiet_is_asked_for_again_by_a_barrier(ends: Ends) -> None:
    ends.replica.snapshot(part(7, 0, B, last=False), 0)
    assert ends.replica.confirm(7, 3.0) == Resync("ram", 0, snapshot=True)


def test_an_index_in_doubt_confirms_nothing(ends: Ends) -> None:
    ends.replica.batch(batch(1, A), 0)
    assert ends.replica.check(Position("ram", 1, 2, 0), 0) == Resync("ram", 1, snapshot=True)
    assert ends.replica.confirm(1, 0) is None
    ends.replica.snapshot(part(2, 0, A + B, last=True), 0)
    assert ends.replica.confirm(1, 0) == Confirmed("ram", 1)


def test_an_index_without_room_confirms_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 1)
    ends.replica.batch(batch(1, A + B), 0)
    assert ends.replica.confirm(1, 0) is None
