"""The tier reader: chunks of one store on their way into memory, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import TypeAlias

from xxhash import xxh3_64

from lmcache_kit.cache.descriptors import ChunkDescriptor, Reservation
from lmcache_kit.cache.memory.memory_tier import MemoryTier
from lmcache_kit.cache.memory.transfers import GetCodec, Transfers, check_blob
from lmcache_kit.cache.records import Query
from lmcache_kit.cache.tiers.blob_header import BlobHeader
from lmcache_kit.cache.tiers.blob_reader import BlobReader
from lmcache_kit.cache.tiers.blob_store import BlobStore
from lmcache_kit.errors import BackendError
from lmcache_kit.keys import ChunkKey

THREADS = 4
AHEAD = 4
"""So many chunks are asked for before their turn, and as many copied: a store on a network, or a
disk with many queues, is only fast when several are on their way."""
STORING_S = 1.0
"""So long a chunk that another owner is storing is waited for."""
_PIECE_BYTES = 2 << 20

_Opened: TypeAlias = tuple[BlobHeader, BlobReader] | None
_Opening: TypeAlias = Future[_Opened]


@dataclass(frozen=True, slots=True)
class PromotionTarget:
    """The owner that references promoted chunks.

    The chunks must fit ``query``, if there is one. ``gone`` tells whether the owner waits no
    longer.
    """

    owner: Hashable
    query: Query | None = None
    gone: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class _Copy:
    """A chunk that is being copied. ``why`` becomes the reason it is unusable, or empty."""

    key: ChunkKey
    ticket: int
    reader: BlobReader
    why: Future[str]


_Begun: TypeAlias = _Copy | bool | BackendError
"""What became of a chunk in its turn: it is copied, here already or none, or that failed."""


class TierReader:
    """Reads chunks of ``store`` into memory; ``transfers`` reserves and commits them."""

    def __init__(
        self, store: BlobStore, memory: MemoryTier, transfers: Transfers, get_codec: GetCodec
    ) -> None:
        self._store = store
        self._memory = memory
        self._transfers = transfers
        self._get_codec = get_codec
        self._threads = ThreadPoolExecutor(THREADS, f"lmcache-kit-fetch-{store.location}")

    def fetch(
        self, keys: Sequence[ChunkKey], target: PromotionTarget
    ) -> Generator[bool, None, None]:
        """Promote these chunks, in order; yields whether each has come.

        A chunk gets its room, and is found, after those before it. Chunks after the last one that
        was asked for do not come. Raises BackendError in the turn of the chunk that it is about.
        """
        begun: deque[_Begun] = deque()
        try:
            with closing(self._open(keys)) as opened:
                for key, opening in opened:
                    # What has come is told of before anything else is waited for.
                    while begun and (len(begun) == AHEAD or not opening.done()):
                        yield self._end(begun.popleft())
                    begun.append(self._begin(key, opening, target))
            while begun:
                yield self._end(begun.popleft())
        finally:
            for each in begun:
                if isinstance(each, _Copy):
                    self._give_up(each)

    def close(self) -> None:
        """Wait for the chunks at work."""
        self._threads.shutdown(cancel_futures=True)

    def _open(self, keys: Sequence[ChunkKey]) -> Generator[tuple[ChunkKey, _Opening], None, None]:
        rest = iter(keys)
        coming: deque[tuple[ChunkKey, _Opening]] = deque()
        try:
            while True:
                for key in islice(rest, AHEAD - len(coming)):
                    coming.append((key, self._threads.submit(self._store.open, key)))
                if not coming:
                    return
                yield coming[0]
                coming.popleft()  # it has been begun; before that, it is ours to close
        finally:
            for _, opening in coming:
                opening.cancel()
                opening.add_done_callback(_close)

    def _begin(self, key: ChunkKey, opening: _Opening, target: PromotionTarget) -> _Begun:
        """Reserve room for a chunk, and start a thread that copies it there."""
        try:
            opened = opening.result()
        except BackendError as error:
            return error
        if opened is None:
            return False
        header, reader = opened
        namespace, query = header.namespace, target.query
        if query and (namespace.chunk_size, namespace.world_size) != (
            query.chunk_size,
            query.world_size,
        ):
            reader.close()
            self._store.mark_corrupt(key, "its namespace has another shape")
            return False
        reservation = self._reserve(header, target)
        if reservation.status != "granted":
            reader.close()
            return reservation.status == "present"
        why = self._threads.submit(self._fill, header.descriptor, reservation, reader)
        return _Copy(key, reservation.ticket, reader, why)

    def _end(self, begun: _Begun) -> bool:
        if isinstance(begun, BackendError):
            raise begun
        if isinstance(begun, bool):
            return begun
        try:
            why = begun.why.result()
        except BackendError:
            self._transfers.abort(begun.ticket)
            raise
        if why:
            self._transfers.abort(begun.ticket)
            self._store.mark_corrupt(begun.key, why)
            return False
        return self._transfers.commit(begun.ticket)

    def _give_up(self, copy: _Copy) -> None:
        if copy.why.cancel():
            copy.reader.close()
        else:
            copy.why.exception()  # when it has ended, nobody writes there any more
        self._transfers.abort(copy.ticket)

    def _reserve(self, header: BlobHeader, target: PromotionTarget) -> Reservation:
        """Reserve memory for a chunk. One that another owner is storing is waited for, shortly."""
        descriptor, namespace = header
        state, deadline = self._memory.state, monotonic() + STORING_S
        pending = state.index.pending
        while True:
            [reservation] = self._transfers.reserve(
                [descriptor], {namespace.digest: namespace}, target.owner, self._get_codec
            )
            left_s = deadline - monotonic()
            if reservation.status != "storing" or target.gone() or left_s <= 0:
                return reservation
            state.wait_for(lambda: descriptor.key not in pending or target.gone(), left_s)

    def _fill(
        self, descriptor: ChunkDescriptor, reservation: Reservation, reader: BlobReader
    ) -> str:
        """Copy a chunk; returns why it is unusable, or empty. Raises BackendError."""
        with closing(reader):
            for region, extent in zip(reservation.regions, descriptor.extents, strict=True):
                with self._memory.backend.view(region) as view:
                    try:
                        checksum = _copied(reader, view)
                    except EOFError as error:
                        return str(error)
                    if checksum != extent.checksum:
                        return "the bytes do not match their checksum"
                    if reservation.codec and (why := check_blob(reservation.codec, view)):
                        return why
        return ""


def _close(opening: _Opening) -> None:
    if not opening.cancelled() and not opening.exception() and (opened := opening.result()):
        opened[1].close()


def _copied(reader: BlobReader, target: memoryview) -> int:
    """Fill ``target`` and return the checksum of its bytes.

    Each piece is hashed while it is in the cache of the processor, which is faster than to hash all
    of it afterwards.
    """
    hashed = xxh3_64()
    for start in range(0, len(target), _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        reader.read_into(piece)
        hashed.update(piece)
    checksum: int = hashed.intdigest()
    return checksum
