"""The controller's copy of one location: apply changes, notice a gap, and resync.

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
    check_partial_chunks,
    split_keys,
)

MAX_BUFFERED = 256
MAX_KEYS = 16_000_000


@dataclass(slots=True)
class _PartialSnapshot:
    """A snapshot under construction, in a holder that is not visible to lookups."""

    seq: int
    touched: float
    next_part: int = 0
    full: bool = False
    buffered: list[Batch] = field(default_factory=list)


class Replica:
    """Keeps one holder of the index equal to one location of one incarnation.

    Batches apply in order. A batch that leaves a gap is dropped, and a resync asks for everything
    after the last one that was applied. A snapshot is built in a new holder. Meanwhile batches
    apply to the old holder and are buffered for the new one, and the swap is one step.
    ``retry_s`` is the time before the same resync is asked for again.
    """

    def __init__(self, index: KeyIndex, owner: Owner, retry_s: float, counts: Counter[str]) -> None:
        self.seq = 0
        self.holder = index.open(owner)
        self._index = index
        self._retry_s = retry_s
        self._counts = counts
        self._building: _PartialSnapshot | None = None
        self._built = self.holder
        self._resync_at: float | None = None
        self._resync_snapshot = False
        self._full = False

    def batch(self, batch: Batch, now: float) -> Resync | None:
        """Apply a batch. Raise ProtocolError for a blob or a partial chunk that is malformed."""
        check_partial_chunks(batch.partial_chunks)
        added, removed = split_keys(batch.added), split_keys(batch.removed)
        building = self._building
        if building and batch.seq == building.seq + len(building.buffered) + 1:
            # A batch beyond the buffer is a gap after the swap, and is resynced as one.
            if len(building.buffered) < MAX_BUFFERED:
                building.buffered.append(batch)
            building.touched = now
        if batch.seq <= self.seq:
            self._counts["batches_repeated_total"] += 1
            return None
        if batch.seq != self.seq + 1:
            if building:
                return None
            self._counts["gaps_total"] += 1
            return self._resync(now)
        if self._has_room(len(added)):
            self._index.remove(self.holder, removed)
            self._index.add(self.holder, added, batch.partial_chunks)
        self.seq = batch.seq
        self._counts["batches_total"] += 1
        self._counts["keys_added_total"] += len(added)
        self._counts["keys_removed_total"] += len(removed)
        if not self._resync_snapshot:
            self._resync_at = None
        return None

    def snapshot(self, part: SnapshotPart, now: float) -> Resync | None:
        """Apply a part. Raise ProtocolError for a blob or a partial chunk that is malformed."""
        check_partial_chunks(part.partial_chunks)
        keys = split_keys(part.keys)
        building = self._building
        if part.seq < (building.seq if building else self.seq):
            self._counts["snapshot_parts_late_total"] += 1
            return None
        if part.part == 0 and not (building and building.seq == part.seq):
            self.drop_unfinished()
            self._built = self._index.open(self.holder.owner)
            building = self._building = _PartialSnapshot(part.seq, now)
        if building is None or part.seq != building.seq or part.part > building.next_part:
            self.drop_unfinished()
            self._counts["snapshots_broken_total"] += 1
            return self._resync(now, snapshot=True)
        if part.part < building.next_part:
            self._counts["snapshot_parts_late_total"] += 1
            return None
        building.next_part += 1
        building.touched = now
        building.full = building.full or self._built.keys + len(keys) > MAX_KEYS
        if not building.full:
            self._index.add(self._built, keys, part.partial_chunks)
        if part.last:
            self._swap(building)
        return None

    def check(self, position: Position, now: float) -> Resync | None:
        """Compare with the position in a heartbeat of the other end."""
        if self._building:
            return self._check_snapshot(self._building, now)
        if position.seq > self.seq:
            return self._resync(now)
        if position.seq < self.seq or self._full:
            return None
        if (self.holder.keys, self.holder.xor) != (position.keys, position.xor):
            self._counts["digest_mismatches_total"] += 1
            return self._resync(now, snapshot=True)
        self._resync_at, self._resync_snapshot = None, False
        return None

    def confirm(self, seq: int, now: float) -> Confirmed | Resync | None:
        """Confirm that everything up to ``seq`` is held, or resync."""
        if self.seq >= seq and not self._full and not self._resync_snapshot:
            self._counts["confirmations_total"] += 1
            return Confirmed(self.holder.owner.location, seq)
        if self._building:
            return self._check_snapshot(self._building, now)
        return None if self._full else self._resync(now)

    def restart(self) -> int:
        """Start over on a new connection, and return the last ``seq`` that is held."""
        self.drop_unfinished()
        self._resync_at, self._resync_snapshot = None, False
        return self.seq

    def drop_unfinished(self) -> None:
        """Drop a snapshot that is not complete."""
        if self._building:
            self._index.close(self._built)
            self._building = None

    def close(self) -> None:
        """Remove all keys of the location from the index."""
        self.drop_unfinished()
        self._index.close(self.holder)

    def _swap(self, building: _PartialSnapshot) -> None:
        self._index.replace(self.holder, self._built)
        self.holder, self._building = self._built, None
        self.seq = building.seq
        self._full = building.full
        self._resync_at, self._resync_snapshot = None, False
        self._counts["snapshots_total"] += 1
        for batch in building.buffered:
            self._index.remove(self.holder, split_keys(batch.removed))
            self._index.add(self.holder, split_keys(batch.added), batch.partial_chunks)
            self.seq = batch.seq

    def _check_snapshot(self, building: _PartialSnapshot, now: float) -> Resync | None:
        """Ask for a new snapshot when no part of this one has come for a while."""
        if now - building.touched < self._retry_s:
            return None
        self.drop_unfinished()
        self._counts["snapshots_broken_total"] += 1
        return self._resync(now, snapshot=True)

    def _has_room(self, keys: int) -> bool:
        self._full = self._full or self.holder.keys + keys > MAX_KEYS
        return not self._full

    def _resync(self, now: float, *, snapshot: bool = False) -> Resync | None:
        """Ask at most once per ``retry_s``; a snapshot instead of a replay at once."""
        stronger = snapshot and not self._resync_snapshot
        if self._resync_at is not None and not stronger and now - self._resync_at < self._retry_s:
            return None
        self._resync_at = now
        self._resync_snapshot = self._resync_snapshot or snapshot
        self._counts["resyncs_total"] += 1
        return Resync(self.holder.owner.location, self.seq, self._resync_snapshot)
