"""The cache process's side of one location's event stream: number changes, keep the last ones,
say what to send next.

No sockets and no clock. The engine's threads only take notes here (:meth:`EventLog.added`,
:meth:`EventLog.removed`); all else belongs to the agent's thread. The other end is
:class:`~lmcache_kit.controller.replica.Replica`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lmcache_kit.cache.records import StoredChunk
from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol.control import Batch, Position, SnapshotPart, Tail

KEYS_PER_MESSAGE = 4096
MAX_NOTES = 262_144
MAX_PAST_KEYS = 131_072
_KEYS_WORTH_A_BATCH = 8
_LOW_64 = (1 << 64) - 1


class EventLog:
    """A :class:`~lmcache_kit.cache.records.ChangeListener` for one location.

    The past is bounded by ``max_past_keys``, notes that nobody took by ``max_notes``; what is no
    longer there is healed by a snapshot, which :attr:`wants_snapshot` asks for.
    """

    def __init__(
        self,
        location: str,
        *,
        max_notes: int = MAX_NOTES,
        max_past_keys: int = MAX_PAST_KEYS,
        keys_per_message: int = KEYS_PER_MESSAGE,
    ) -> None:
        self.location = location
        self.seq = 0
        self.dropped_notes = 0
        self._max_notes = max_notes
        self._max_past_keys = max_past_keys
        self._keys_per_message = keys_per_message
        self._lock = threading.Lock()
        self._notes: list[StoredChunk | ChunkKey] = []
        self._deaf = False
        self._wanted = False
        self._keys = 0
        self._xor = 0
        self._past: dict[int, Batch] = {}
        self._past_keys = 0
        self._next_seq = 1
        self._snapshot: Sequence[StoredChunk] | None = None
        self._snapshot_seq = 0
        self._next_part = 0

    # The engine's threads, under the engine's lock.

    def added(self, chunk: StoredChunk) -> None:
        """Take a note."""
        self._note(chunk)

    def removed(self, key: ChunkKey) -> None:
        """Take a note."""
        self._note(key)

    def snapshot_is(self, chunks: Sequence[StoredChunk]) -> None:
        """All there is, as of now: earlier notes are part of it. Called under the engine's lock,
        on the agent's thread."""
        with self._lock:
            self._notes = []
            self._deaf = False
        self._snapshot = chunks

    # The agent's thread.

    def has_notes(self) -> bool:
        """Whether :meth:`flush` has something to do."""
        return bool(self._notes)

    @property
    def wants_snapshot(self) -> bool:
        """Whether the rest cannot be told without :meth:`snapshot_is`."""
        return self._wanted or self._deaf

    def want_snapshot(self) -> None:
        """The other end asks for one, or what is known here is in doubt."""
        self._wanted = True

    def flush(self) -> None:
        """Number what was noted. Later changes of a key override earlier ones."""
        with self._lock:
            notes, self._notes = self._notes, []
        changes: dict[ChunkKey, StoredChunk | None] = {}
        count, xor = self._keys, self._xor
        for note in notes:
            if isinstance(note, tuple):
                key: ChunkKey = note.key
                changes[key] = note
                count += 1
            else:
                key = note
                changes[key] = None
                count -= 1
            xor ^= int.from_bytes(key[:8], "little")
        self._keys, self._xor = count, xor
        items = list(changes.items())
        for start in range(0, len(items), self._keys_per_message):
            self._number(items[start : start + self._keys_per_message])

    def begin_with(self, chunks: Sequence[StoredChunk]) -> None:
        """What lay there before any note was taken."""
        if chunks:
            self.seq = 1
            self._next_seq = 1
            self._sum_up(chunks)

    def resume(self, after_seq: int) -> None:
        """The other end holds everything up to ``after_seq``; send what came later.

        A snapshot that was being sent is given up: the past before it is gone, so that another
        one follows where it is still needed.
        """
        self._snapshot = None
        self._wanted = self._wanted or after_seq > self.seq
        self._next_seq = after_seq + 1

    def start_snapshot(self) -> None:
        """Send what :meth:`snapshot_is` was told. It takes a number of its own, and the past
        before it is of no more use."""
        assert self._snapshot is not None
        self._wanted = False
        self.seq += 1
        self._past.clear()
        self._past_keys = 0
        self._next_seq = self.seq + 1
        self._next_part = 0
        self._snapshot_seq = self.seq
        self._sum_up(self._snapshot)

    def next_message(self) -> Batch | SnapshotPart | None:
        """What to send now; the same again until :meth:`sent`. None: nothing, or a snapshot has
        to be taken first."""
        if self.wants_snapshot:
            return None
        if self._snapshot is not None:
            return self._part(self._snapshot)
        if self._next_seq > self.seq:
            return None
        batch = self._past.get(self._next_seq)
        self._wanted = batch is None
        return batch

    @property
    def last_seq(self) -> int:
        """The number that all which is numbered by now is told by, at the latest."""
        return self.seq + self.wants_snapshot

    def has_sent(self, seq: int) -> bool:
        """Whether everything up to ``seq`` is on its way."""
        return not self.wants_snapshot and self._snapshot is None and self._next_seq > seq

    @property
    def sending_snapshot(self) -> bool:
        """Whether parts of one are still to be sent."""
        return self._snapshot is not None

    def sent(self) -> None:
        """The last :meth:`next_message` is on its way."""
        if self._snapshot is None:
            self._next_seq += 1
            return
        self._next_part += 1
        if self._next_part * self._keys_per_message >= len(self._snapshot):
            self._snapshot = None

    def position(self) -> Position | None:
        """For the heartbeat; None while something is still to be sent."""
        if self.wants_snapshot or self._snapshot is not None or self._next_seq <= self.seq:
            return None
        return Position(self.location, self.seq, self._keys, self._xor)

    def _note(self, note: StoredChunk | ChunkKey) -> None:
        with self._lock:
            if self._deaf or len(self._notes) >= self._max_notes:
                self._deaf = True
                self._notes = []
                self.dropped_notes += 1
            else:
                self._notes.append(note)

    def _number(self, changes: list[tuple[ChunkKey, StoredChunk | None]]) -> None:
        self.seq += 1
        chunks = [chunk for _, chunk in changes if chunk is not None]
        self._past[self.seq] = Batch(
            location=self.location,
            seq=self.seq,
            added=b"".join([chunk.key for chunk in chunks]),
            removed=b"".join([key for key, chunk in changes if chunk is None]),
            tails=_tails(chunks),
        )
        self._past_keys += len(changes) + _KEYS_WORTH_A_BATCH
        while self._past_keys > self._max_past_keys and len(self._past) > 1:
            oldest = self._past.pop(next(iter(self._past)))
            changed = (len(oldest.added) + len(oldest.removed)) // 16
            self._past_keys -= changed + _KEYS_WORTH_A_BATCH

    def _part(self, chunks: Sequence[StoredChunk]) -> SnapshotPart:
        start = self._next_part * self._keys_per_message
        some = chunks[start : start + self._keys_per_message]
        return SnapshotPart(
            location=self.location,
            seq=self._snapshot_seq,
            part=self._next_part,
            last=start + self._keys_per_message >= len(chunks),
            keys=b"".join([chunk.key for chunk in some]),
            tails=_tails(some),
        )

    def _sum_up(self, chunks: Sequence[StoredChunk]) -> None:
        xor = 0
        for chunk in chunks:
            xor ^= int.from_bytes(chunk.key, "little")
        self._keys, self._xor = len(chunks), xor & _LOW_64


def _tails(chunks: Sequence[StoredChunk]) -> tuple[Tail, ...]:
    return tuple([Tail(chunk.key, chunk.parent, chunk.tokens) for chunk in chunks if chunk.partial])
