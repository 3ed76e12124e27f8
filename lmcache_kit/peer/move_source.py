"""What a move needs of its source, whether that is a peer or a tier of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
from lmcache_kit.interfaces.operations import Transfer
from lmcache_kit.keys import ChunkKey


@dataclass(slots=True)
class MoveStats:
    """What became of the chunks of a move so far.

    ``arrived``: chunks that the destination holds for this move, ``present`` of which it had
    before. ``gone``: chunks that the source did not have any more. ``retry``: chunks that another
    request is storing here at the moment, or whose bytes did not match their checksums.
    ``failures``: reasons why others did not arrive. ``full``: there was no room; the move ends.
    ``nbytes`` were transferred in ``seconds``.
    """

    arrived: dict[ChunkKey, None] = field(default_factory=dict)
    present: int = 0
    gone: int = 0
    retry: list[ChunkKey] = field(default_factory=list)
    full: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    seconds: float = 0.0

    def add_arrived(self, keys: Sequence[ChunkKey]) -> None:
        """Count chunks that the destination holds now."""
        self.arrived.update(dict.fromkeys(keys))

    def add_present(self, keys: Sequence[ChunkKey]) -> None:
        """Count chunks that the destination had before."""
        self.present += len(keys)
        self.add_arrived(keys)


class MoveSource(Protocol):
    """Where one move takes its chunks from.

    Used by the thread of the move, but for :meth:`abort`. Methods raise KitError.
    """

    name: str
    """For messages."""
    chunks: Sequence[ChunkRef]
    """The chunks to move, each after the one that it follows."""
    incompatible: Mapping[str, int]
    """How many more chunks there are that are of no use here, by the reason."""
    window_bytes: int
    """The most to receive at a time, unless a single chunk is larger."""

    def chunk_size(self, namespace: bytes) -> int:
        """Return the tokens of a whole chunk of this namespace."""
        ...

    def transfer(self, stats: MoveStats) -> Transfer | None:
        """Describe how the bytes travel; None before that is known."""
        ...

    def receive(
        self, keys: Sequence[ChunkKey], *, owner: Hashable, stats: MoveStats, timeout_s: float
    ) -> None:
        """Bring chunks into this process's memory and hold a reference to each for ``owner``.

        What has arrived until an error is raised stays.
        """
        ...

    def end_receiving(self) -> None:
        """Free what only :meth:`receive` needs; all chunks have arrived that will."""
        ...

    def delete(self, keys: Sequence[ChunkKey]) -> DeleteResult:
        """Delete chunks, of which the destination has copies."""
        ...

    def abort(self) -> None:
        """Make calls under way fail soon. Safe from any thread."""
        ...

    def close(self) -> None:
        """End the use of the source. Safe to call twice."""
        ...
