"""The index's side of one location's event stream: apply, notice what is lost, ask again.

No sockets and no clock: the caller passes the time in. The other end is
:class:`~lmcache_kit.agent.event_log.EventLog`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lmcache_kit.controller.key_index import KeyIndex, Owner
from lmcache_kit.protocol.control import (
    Batch,
    Confirmed,
    Position,
    Resync,
    SnapshotPart,
    check_tails,
    split_keys,
)

MAX_BUFFERED = 256
MAX_KEYS = 16_000_000


@dataclass(slots=True)
class _Aside:
    """A snapshot that is being built under a holder that no lookup sees."""

    seq: int
    touched: float
    next_part: int = 0
    full: bool = False
    buffered: list[Batch] = field(default_factory=list)


class Replica:
    """Keeps one holder of the index equal to one location of one life of a cache process.

    Batches apply in order; one that is out of order is dropped and what is missing asked for. A
    snapshot is built under a fresh holder, while batches go on to apply to the old one and wait
    for the new one; the swap is one step. ``retry_s``: how long to wait before asking again.
    """

    def __init__(self, index: KeyIndex, owner: Owner, retry_s: float, counts: Counter[str]) -> None:
        self.seq = 0
        self.holder = index.open(owner)
        self._index = index
        self._retry_s = retry_s
        self._counts = counts
        self._aside: _Aside | None = None
        self._built = self.holder
        self._asked_at: float | None = None
        self._asked_snapshot = False
        self._full = False

    def batch(self, batch: Batch, now: float) -> Resync | None:
        """Raises ProtocolError for blobs that are no keys, and for impossible tails."""
        check_tails(batch.tails)
        added, removed = split_keys(batch.added), split_keys(batch.removed)
        aside = self._aside
        if aside and batch.seq == aside.seq + len(aside.buffered) + 1:
            # What does not fit in is a gap after the swap, and healed as one.
            if len(aside.buffered) < MAX_BUFFERED:
                aside.buffered.append(batch)
            aside.touched = now
        if batch.seq <= self.seq:
            self._counts["batches_repeated_total"] += 1
            return None
        if batch.seq != self.seq + 1:
            if aside:
                return None
            self._counts["gaps_total"] += 1
            return self._ask(now)
        if self._has_room(len(added)):
            self._index.remove(self.holder, removed)
            self._index.add(self.holder, added, batch.tails)
        self.seq = batch.seq
        self._counts["batches_total"] += 1
        self._counts["keys_added_total"] += len(added)
        self._counts["keys_removed_total"] += len(removed)
        if not self._asked_snapshot:
            self._asked_at = None
        return None

    def snapshot(self, part: SnapshotPart, now: float) -> Resync | None:
        """Raises ProtocolError for a blob that is no keys, and for impossible tails."""
        check_tails(part.tails)
        keys = split_keys(part.keys)
        aside = self._aside
        if part.seq < (aside.seq if aside else self.seq):
            self._counts["snapshot_parts_late_total"] += 1
            return None
        if part.part == 0 and not (aside and aside.seq == part.seq):
            self.forget_unfinished()
            self._built = self._index.open(self.holder.owner)
            aside = self._aside = _Aside(part.seq, now)
        if aside is None or part.seq != aside.seq or part.part > aside.next_part:
            self.forget_unfinished()
            self._counts["snapshots_broken_total"] += 1
            return self._ask(now, snapshot=True)
        if part.part < aside.next_part:
            self._counts["snapshot_parts_late_total"] += 1
            return None
        aside.next_part += 1
        aside.touched = now
        aside.full = aside.full or self._built.keys + len(keys) > MAX_KEYS
        if not aside.full:
            self._index.add(self._built, keys, part.tails)
        if part.last:
            self._swap(aside)
        return None

    def check(self, position: Position, now: float) -> Resync | None:
        """Compare with what a heartbeat says of the other end."""
        if self._aside:
            return self._hurry(self._aside, now)
        if position.seq > self.seq:
            return self._ask(now)
        if position.seq < self.seq or self._full:
            return None
        if (self.holder.keys, self.holder.xor) != (position.keys, position.xor):
            self._counts["digest_mismatches_total"] += 1
            return self._ask(now, snapshot=True)
        self._asked_at, self._asked_snapshot = None, False
        return None

    def confirm(self, seq: int, now: float) -> Confirmed | Resync | None:
        """Say so if everything up to ``seq`` is held, and ask for what is missing if not."""
        if self.seq >= seq and not self._full and not self._asked_snapshot:
            self._counts["confirmations_total"] += 1
            return Confirmed(self.holder.owner.location, seq)
        if self._aside:
            return self._hurry(self._aside, now)
        return None if self._full else self._ask(now)

    def restart(self) -> int:
        """A new connection begins: forget what the old one left half done. The last seq held."""
        self.forget_unfinished()
        self._asked_at, self._asked_snapshot = None, False
        return self.seq

    def forget_unfinished(self) -> None:
        """Drop a snapshot that was not completed."""
        if self._aside:
            self._index.close(self._built)
            self._aside = None

    def close(self) -> None:
        """Nothing of it is found any more."""
        self.forget_unfinished()
        self._index.close(self.holder)

    def _swap(self, aside: _Aside) -> None:
        self._index.replace(self.holder, self._built)
        self.holder, self._aside = self._built, None
        self.seq = aside.seq
        self._full = aside.full
        self._asked_at, self._asked_snapshot = None, False
        self._counts["snapshots_total"] += 1
        for batch in aside.buffered:
            self._index.remove(self.holder, split_keys(batch.removed))
            self._index.add(self.holder, split_keys(batch.added), batch.tails)
            self.seq = batch.seq

    def _hurry(self, aside: _Aside, now: float) -> Resync | None:
        """Begin anew when a snapshot has gone quiet."""
        if now - aside.touched < self._retry_s:
            return None
        self.forget_unfinished()
        self._counts["snapshots_broken_total"] += 1
        return self._ask(now, snapshot=True)

    def _has_room(self, keys: int) -> bool:
        self._full = self._full or self.holder.keys + keys > MAX_KEYS
        return not self._full

    def _ask(self, now: float, *, snapshot: bool = False) -> Resync | None:
        """The same question again only after a while; a stronger one at once."""
        stronger = snapshot and not self._asked_snapshot
        if self._asked_at is not None and not stronger and now - self._asked_at < self._retry_s:
            return None
        self._asked_at = now
        self._asked_snapshot = self._asked_snapshot or snapshot
        self._counts["resyncs_total"] += 1
        return Resync(self.holder.owner.location, self.seq, self._asked_snapshot)
