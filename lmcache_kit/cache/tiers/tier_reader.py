"""Chunks of one tier on their way into memory, several at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from xxhash import xxh3_64

from lmcache_kit.cache.descriptors import ChunkDescriptor, Reservation
from lmcache_kit.cache.memory.transfers import check_blob
from lmcache_kit.cache.tiers.blob_header import BlobHeader
from lmcache_kit.cache.tiers.blob_reader import BlobReader
from lmcache_kit.errors import BackendError
from lmcache_kit.keys import ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import MemoryIndex
    from lmcache_kit.cache.lookup import Query
    from lmcache_kit.cache.memory.transfers import GetCodec, Transfers
    from lmcache_kit.cache.tiers.store_tier import StoreTier

THREADS = 4
AHEAD = 4
"""So many chunks are asked for before their turn, and as many copied: a store on a network, or a
disk with many queues, is only fast when several are on their way."""
_AGAIN_S = 0.002
_PATIENCE = 500
_PIECE_BYTES = 2 << 20

_Opened: TypeAlias = "tuple[BlobHeader, BlobReader] | None"
_Opening: TypeAlias = "Future[_Opened]"


@dataclass(frozen=True, slots=True)
class PromotionTarget:
    """Whom chunks are brought for: they are anchored for ``owner``, and must fit ``query``, if it
    has one. ``gone`` tells whether nobody waits for them any longer."""

    owner: Hashable
    query: Query | None = None
    gone: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class _Copy:
    """A chunk that is being copied; ``why`` will tell what is wrong with it, or nothing."""

    key: ChunkKey
    ticket: int
    reader: BlobReader
    why: Future[str]


_Begun: TypeAlias = "_Copy | bool | BackendError"
"""What became of a chunk in its turn: it is copied, here already or none, or that failed."""


class TierReader:
    """Reads from ``tier`` into memory; ``transfers`` lands the chunks."""

    def __init__(
        self, tier: StoreTier, index: MemoryIndex, transfers: Transfers, get_codec: GetCodec
    ) -> None:
        self._tier = tier
        self._memory = index.memory
        self._transfers = transfers
        self._get_codec = get_codec
        self._threads = ThreadPoolExecutor(THREADS, f"lmcache-kit-fetch-{tier.location}")

    def fetch(
        self, keys: Sequence[ChunkKey], target: PromotionTarget
    ) -> Generator[bool, None, None]:
        """Have these chunks in memory: whether each has come, in order. Each gets its room, and is
        found, after those before it; those after the last one that was asked for do not come.

        Raises BackendError in the turn of the chunk that it is about.
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
        """Wait for what is at work."""
        self._threads.shutdown(cancel_futures=True)

    def _open(self, keys: Sequence[ChunkKey]) -> Generator[tuple[ChunkKey, _Opening], None, None]:
        rest = iter(keys)
        coming: deque[tuple[ChunkKey, _Opening]] = deque()
        try:
            while True:
                for key in islice(rest, AHEAD - len(coming)):
                    coming.append((key, self._threads.submit(self._tier.open, key)))
                if not coming:
                    return
                yield coming[0]
                coming.popleft()  # it has been begun; before that, it is ours to close
        finally:
            for _, opening in coming:
                opening.cancel()
                opening.add_done_callback(_close)

    def _begin(self, key: ChunkKey, opening: _Opening, target: PromotionTarget) -> _Begun:
        """Room for what was found, and a thread that copies it there."""
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
            self._tier.mark_corrupt(key, "its namespace has another shape")
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
            self._tier.mark_corrupt(begun.key, why)
            return False
        return self._transfers.commit(begun.ticket)

    def _give_up(self, copy: _Copy) -> None:
        if copy.why.cancel():
            copy.reader.close()
        else:
            copy.why.exception()  # when it has ended, nobody writes there any more
        self._transfers.abort(copy.ticket)

    def _reserve(self, header: BlobHeader, target: PromotionTarget) -> Reservation:
        """Memory for a chunk. One that is on its way for somebody else is waited for, shortly."""
        descriptor, namespace = header
        for _ in range(_PATIENCE):
            [reservation] = self._transfers.reserve(
                [descriptor], {namespace.digest: namespace}, target.owner, self._get_codec
            )
            if reservation.status != "storing" or target.gone():
                break
            time.sleep(_AGAIN_S)
        return reservation

    def _fill(
        self, descriptor: ChunkDescriptor, reservation: Reservation, reader: BlobReader
    ) -> str:
        """Copy it; why it cannot be used, or nothing. Raises BackendError."""
        with closing(reader):
            for region, extent in zip(reservation.regions, descriptor.extents, strict=True):
                with self._memory.view(region) as view:
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
    """The checksum of what is in ``target`` afterwards. Each piece is hashed while the processor's
    cache has it, which is faster than to hash all of it in the end."""
    hashed = xxh3_64()
    for start in range(0, len(target), _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        reader.read_into(piece)
        hashed.update(piece)
    checksum: int = hashed.intdigest()
    return checksum
