"""Taking chunks from a peer, a bounded number at a time: lend, read, verify, keep, give back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.descriptors import ChunkDescriptor, NamespaceInfo, Reservation
from lmcache_kit.cache.memory.transfers import check_blob
from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import ReadResult, Region
from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol.peer import Lent

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.peer.link_pool import PooledLink
    from lmcache_kit.peer.quarantine import Quarantine
    from lmcache_kit.peer.source_client import SourceClient

STALL_S = 10.0
SLOWEST_BYTES_PER_S = 4e6
"""A read that is slower than this, after the first seconds, will not come to an end."""


class Destination(NamedTuple):
    """Where chunks are taken to. ``hashing`` is a single thread that looks at what has come while
    more comes."""

    engine: CacheEngine
    quarantine: Quarantine
    hashing: Executor
    get_codec: GetCodec


@dataclass(slots=True)
class MoveStats:
    """What became of the chunks of a move so far. ``again``: somebody stored them here just then,
    or what came was not what was stored; it may be worth another try. ``why_not`` counts what
    kept others from coming; ``full`` ends the move."""

    here: dict[ChunkKey, None] = field(default_factory=dict)
    present: int = 0
    gone: int = 0
    again: list[ChunkKey] = field(default_factory=list)
    full: bool = False
    why_not: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    seconds: float = 0.0


class ChunkReceiver:
    """One move's reading. ``link_again`` makes a new link where an old one had been closed by the
    peer. Used by one thread."""

    def __init__(
        self,
        place: Destination,
        remote: SourceClient,
        link: PooledLink,
        link_again: Callable[[], PooledLink],
        owner: Hashable,
    ) -> None:
        self.tally = MoveStats()
        self.link = link
        self._link_again = link_again
        self._place = place
        self._remote = remote
        self._owner = owner
        self._spaces: Mapping[bytes, NamespaceInfo] = {
            space.digest: space for space in remote.welcome.spaces
        }

    def take(self, keys: Sequence[ChunkKey], timeout_s: float) -> None:
        """Have these chunks here. Raises TransportError and OperationFailed; what has come until
        then stays."""
        engine, tally = self._place.engine, self.tally
        missing = engine.references.acquire(keys, self._owner)
        absent = set(missing)
        self.keep([key for key in keys if key not in absent])
        if not missing:
            return
        lent = self._remote.lend(missing, self.link.transport)
        parcels = lent.parcels
        tally.gone += len(missing) - len(parcels)
        if not lent.lease:
            return
        landings = engine.transfers.reserve(
            parcels, self._spaces, self._owner, self._place.get_codec
        )
        coming: list[tuple[int, ChunkDescriptor, Reservation]] = []
        for number, (parcel, landing) in enumerate(zip(parcels, landings, strict=True)):
            match landing.status:
                case "granted":
                    coming.append((number, parcel, landing))
                case "present":
                    self.keep([parcel.key])
                case "storing":
                    tally.again.append(parcel.key)
                case "full":
                    tally.full = True
                case "unfit":
                    tally.why_not[landing.why] += 1
        if coming and (spoilt := self._read(lent, coming, timeout_s)):
            self._remote.recheck(spoilt)
            tally.again += spoilt
        self._remote.give_back(lent.lease)

    def keep(self, present: Sequence[ChunkKey]) -> None:
        """These are here already."""
        self.tally.present += len(present)
        self.tally.here.update(dict.fromkeys(present))

    def _read(
        self,
        lent: Lent,
        coming: Sequence[tuple[int, ChunkDescriptor, Reservation]],
        timeout_s: float,
    ) -> list[ChunkKey]:
        """Those that came spoilt."""
        arrivals = _Arrivals(self._place, [(parcel, landing) for _, parcel, landing in coming])
        begin = time.monotonic()
        unsettled: Callable[[], bool] | None = None
        try:
            self._read_into(arrivals, lent, [number for number, _, _ in coming], timeout_s)
        except TransferTimeout as error:
            unsettled = error.settled
            raise
        finally:
            self.tally.seconds += time.monotonic() - begin
            arrivals.finish()
            self.tally.nbytes += arrivals.nbytes
            self.tally.here.update(dict.fromkeys(arrivals.landed))
            self.tally.why_not.update(arrivals.unreadable)
            left = arrivals.tickets_left()
            if left and unsettled:
                self._place.quarantine.add(self.link.transport, unsettled, left)
            else:
                for ticket in left:
                    self._place.engine.transfers.abort(ticket)
        return arrivals.spoilt

    def _read_into(
        self, arrivals: _Arrivals, lent: Lent, numbers: Sequence[int], timeout_s: float
    ) -> None:
        total = sum(region.nbytes for region in arrivals.regions)
        timeout_s = min(timeout_s, STALL_S + total / SLOWEST_BYTES_PER_S)
        offer = lent.offer if len(numbers) == len(lent.parcels) else b""
        while True:
            offer = offer or self._remote.offer(lent.lease, self.link.transport, numbers)
            try:
                for landed in self.link.link.read(offer, arrivals.regions, timeout_s):
                    arrivals.came(landed)
            except TransferTimeout:
                raise
            except TransportError:
                # The peer may have closed a link that nobody used for long.
                if not self.link.used or arrivals.any_came:
                    raise
                self.link.link.close()
                self.link, offer = self._link_again(), b""
            else:
                self.link.used = True
                return


class _Arrivals:
    """Parcels on their way. What has come is verified on the hashing thread, in order."""

    def __init__(
        self, place: Destination, coming: Sequence[tuple[ChunkDescriptor, Reservation]]
    ) -> None:
        self.regions: list[Region] = [region for _, landing in coming for region in landing.regions]
        self.landed: list[ChunkKey] = []
        self.spoilt: list[ChunkKey] = []
        self.unreadable: Counter[str] = Counter()
        self.nbytes = 0
        self.any_came = False
        self._place = place
        self._parts = [
            (at, rank)
            for at, (_, landing) in enumerate(coming)
            for rank in range(len(landing.regions))
        ]
        self._coming = coming
        self._missing = [len(landing.regions) for _, landing in coming]
        self._not_landed = dict.fromkeys(range(len(coming)))
        self._given_up: set[int] = set()
        self._last = place.hashing.submit(lambda: None)

    def came(self, landed: ReadResult) -> None:
        """Look at a region as soon as the hashing thread gets to it."""
        self.any_came = True
        self.nbytes += self.regions[landed.number].nbytes
        self._last = self._place.hashing.submit(self._verify, landed)

    def finish(self) -> None:
        """Wait until all that has come was looked at."""
        self._last.result()

    def tickets_left(self) -> list[int]:
        """Of parcels that have not landed. Of these, too, bytes may still be on their way until
        the read has ended."""
        return [self._coming[at][1].ticket for at in self._not_landed]

    def _verify(self, landed: ReadResult) -> None:
        at, rank = self._parts[landed.number]
        parcel, landing = self._coming[at]
        if at in self._given_up or not self._is_sound(at, rank, landed.checksum):
            return
        self._missing[at] -= 1
        if not self._missing[at]:
            del self._not_landed[at]
            if self._place.engine.transfers.commit(landing.ticket):
                self.landed.append(parcel.key)

    def _is_sound(self, at: int, rank: int, checksum: int | None) -> bool:
        parcel, landing = self._coming[at]
        region = landing.regions[rank]
        with self._place.engine.memory.view(region) as view:
            if checksum is None:
                checksum = xxh3_64_intdigest(view)
            intact = checksum == parcel.extents[rank].checksum
            why = check_blob(landing.codec, view) if intact and landing.codec else ""
        if not intact:
            self.spoilt.append(parcel.key)
        if why:
            self.unreadable[why] += 1
        if why or not intact:
            self._given_up.add(at)
        return intact and not why
