"""The numbered changes of one location, from which the agent sends batches and snapshots.

No sockets and no clock. The engine's threads only append here (:meth:`EventLog.added`,
:meth:`EventLog.removed`); all else belongs to the agent's thread. The other end is
:class:`~lmcache_kit.controller.replica.Replica`.

A change is pending until :meth:`EventLog.flush` gives it a sequence number in a batch. Batches stay
in a bounded history, from which :meth:`EventLog.replay` sends again. Where the history has ended,
or where changes were dropped because too many were pending, only a snapshot brings the other end up
to date: :attr:`EventLog.snapshot_needed` asks for one, and it takes a sequence number of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lmcache_kit.cache.records import StoredChunk
from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol.control import Batch, PartialChunkEntry, Position, SnapshotPart

KEYS_PER_MESSAGE = 4096
MAX_PENDING = 262_144
MAX_HISTORY_KEYS = 131_072
_KEYS_WORTH_A_BATCH = 8
_LOW_64 = (1 << 64) - 1


class EventLog:
    """A :class:`~lmcache_kit.cache.records.ChangeListener` for one location.

    ``max_pending`` bounds the changes without a number, ``max_history_keys`` the history.
    """

    def __init__(
        self,
        location: str,
        *,
        max_pending: int = MAX_PENDING,
        max_history_keys: int = MAX_HISTORY_KEYS,
        keys_per_message: int = KEYS_PER_MESSAGE,
    ) -> None:
        self.location = location
        self.seq = 0
        self.dropped = 0
        self._max_pending = max_pending
        self._max_history_keys = max_history_keys
        self._keys_per_message = keys_per_message
        self._lock = threading.Lock()
        self._pending: list[StoredChunk | ChunkKey] = []
        self._overflowed = False
        self._requested = False
        self._keys = 0
        self._xor = 0
        self._history: dict[int, Batch] = {}
        self._history_keys = 0
        self._next_seq = 1
        self._snapshot: Sequence[StoredChunk] | None = None
        self._snapshot_seq = 0
        self._next_part = 0

    # The engine's threads, under the engine's lock.

    def added(self, chunk: StoredChunk) -> None:
        """Append a stored chunk."""
        self._append(chunk)

    def removed(self, key: ChunkKey) -> None:
        """Append the removal of a chunk."""
        self._append(key)

    def load_snapshot(self, chunks: Sequence[StoredChunk]) -> None:
        """Take all chunks of the location, which include all pending changes.

        Called under the engine's lock, on the agent's thread.
        """
        with self._lock:
            self._pending = []
            self._overflowed = False
        self._snapshot = chunks

    # The agent's thread.

    @property
    def has_pending(self) -> bool:
        """Whether changes wait for a number."""
        return bool(self._pending)

    @property
    def snapshot_needed(self) -> bool:
        """Whether nothing can be sent before :meth:`load_snapshot`."""
        return self._requested or self._overflowed

    def request_snapshot(self) -> None:
        """Send a snapshot next, because the other end asks for it or the log is in doubt."""
        self._requested = True

    def flush(self) -> None:
        """Number the pending changes. A later change of a key replaces an earlier one."""
        with self._lock:
            pending, self._pending = self._pending, []
        changes: dict[ChunkKey, StoredChunk | None] = {}
        count, xor = self._keys, self._xor
        for change in pending:
            if isinstance(change, tuple):
                key: ChunkKey = change.key
                changes[key] = change
                count += 1
            else:
                key = change
                changes[key] = None
                count -= 1
            xor ^= int.from_bytes(key[:8], "little")
        self._keys, self._xor = count, xor
        items = list(changes.items())
        for start in range(0, len(items), self._keys_per_message):
            self._add_batch(items[start : start + self._keys_per_message])

    def preload(self, chunks: Sequence[StoredChunk]) -> None:
        """Begin with the chunks that were there before any change was appended."""
        if chunks:
            self.seq = 1
            self._next_seq = 1
            self._update_digest(chunks)

    def replay(self, after_seq: int) -> None:
        """Send everything after ``after_seq`` again.

        A snapshot under way is given up. The history before it is gone, so that another snapshot
        follows where one is still needed.
        """
        self._snapshot = None
        self._requested = self._requested or after_seq > self.seq
        self._next_seq = after_seq + 1

    def start_snapshot(self) -> None:
        """Number the loaded snapshot, and send it next. The history before it is dropped."""
        assert self._snapshot is not None
        self._requested = False
        self.seq += 1
        self._history.clear()
        self._history_keys = 0
        self._next_seq = self.seq + 1
        self._next_part = 0
        self._snapshot_seq = self.seq
        self._update_digest(self._snapshot)

    def next_message(self) -> Batch | SnapshotPart | None:
        """Return the message to send, the same one until :meth:`mark_sent`.

        None means that nothing is left to send, or that a snapshot is needed first.
        """
        if self.snapshot_needed:
            return None
        if self._snapshot is not None:
            return self._part(self._snapshot)
        if self._next_seq > self.seq:
            return None
        batch = self._history.get(self._next_seq)
        self._requested = batch is None
        return batch

    @property
    def last_seq(self) -> int:
        """The sequence number by which the other end knows all changes that are not pending."""
        return self.seq + self.snapshot_needed

    def has_sent(self, seq: int) -> bool:
        """Whether everything up to ``seq`` is sent."""
        return not self.snapshot_needed and self._snapshot is None and self._next_seq > seq

    @property
    def sending_snapshot(self) -> bool:
        """Whether parts of a snapshot are still to be sent."""
        return self._snapshot is not None

    def mark_sent(self) -> None:
        """Go on to the message after the last :meth:`next_message`."""
        if self._snapshot is None:
            self._next_seq += 1
            return
        self._next_part += 1
        if self._next_part * self._keys_per_message >= len(self._snapshot):
            self._snapshot = None

    def position(self) -> Position | None:
        """Return the position for a heartbeat; None while something is still to be sent."""
        if self.snapshot_needed or self._snapshot is not None or self._next_seq <= self.seq:
            return None
        return Position(self.location, self.seq, self._keys, self._xor)

    def _append(self, change: StoredChunk | ChunkKey) -> None:
        with self._lock:
            if self._overflowed or len(self._pending) >= self._max_pending:
                self._overflowed = True
                self._pending = []
                self.dropped += 1
            else:
                self._pending.append(change)

    def _add_batch(self, changes: list[tuple[ChunkKey, StoredChunk | None]]) -> None:
        self.seq += 1
        chunks = [chunk for _, chunk in changes if chunk is not None]
        self._history[self.seq] = Batch(
            location=self.location,
            seq=self.seq,
            added=b"".join([chunk.key for chunk in chunks]),
            removed=b"".join([key for key, chunk in changes if chunk is None]),
            partial_chunks=_partial_chunks(chunks),
        )
        self._history_keys += len(changes) + _KEYS_WORTH_A_BATCH
        while self._history_keys > self._max_history_keys and len(self._history) > 1:
            oldest = self._history.pop(next(iter(self._history)))
            changed = (len(oldest.added) + len(oldest.removed)) // 16
            self._history_keys -= changed + _KEYS_WORTH_A_BATCH

    def _part(self, chunks: Sequence[StoredChunk]) -> SnapshotPart:
        start = self._next_part * self._keys_per_message
        some = chunks[start : start + self._keys_per_message]
        return SnapshotPart(
            location=self.location,
            seq=self._snapshot_seq,
            part=self._next_part,
            last=start + self._keys_per_message >= len(chunks),
            keys=b"".join([chunk.key for chunk in some]),
            partial_chunks=_partial_chunks(some),
        )

    def _update_digest(self, chunks: Sequence[StoredChunk]) -> None:
        xor = 0
        for chunk in chunks:
            xor ^= int.from_bytes(chunk.key, "little")
        self._keys, self._xor = len(chunks), xor & _LOW_64


def _partial_chunks(chunks: Sequence[StoredChunk]) -> tuple[PartialChunkEntry, ...]:
    entries = [PartialChunkEntry(c.key, c.parent, c.tokens) for c in chunks if c.partial]
    return tuple(entries)
