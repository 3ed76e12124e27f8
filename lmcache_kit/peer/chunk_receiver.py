"""Receive chunks from a peer: lease, reserve, read, verify, commit, release."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.descriptors import ChunkDescriptor, NamespaceInfo, Reservation
from lmcache_kit.cache.memory.transfers import check_blob
from lmcache_kit.errors import TransferTimeout, TransportError
from lmcache_kit.interfaces import ReadResult, Region
from lmcache_kit.keys import ChunkKey
from lmcache_kit.peer.move_source import MoveStats
from lmcache_kit.protocol.peer import Leased

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.memory.transfers import GetCodec
    from lmcache_kit.peer.link_pool import PooledLink
    from lmcache_kit.peer.quarantine import Quarantine
    from lmcache_kit.peer.source_client import SourceClient

STALL_S = 10.0
SLOWEST_BYTES_PER_S = 4e6
"""A read that is slower than this, after its first ``STALL_S`` seconds, is given up."""


class Destination(NamedTuple):
    """The memory that chunks from peers are received into.

    ``hashing`` is a single thread that verifies what has arrived while more arrives.
    """

    engine: CacheEngine
    quarantine: Quarantine
    hashing: Executor
    get_codec: GetCodec


class ChunkReceiver:
    """Receives the chunks of one move over one link, a window at a time. Used by one thread.

    ``reconnect`` makes a new link in place of one that the peer closed while it was idle.
    ``owner`` holds a reference to each chunk that has arrived.
    """

    def __init__(
        self,
        destination: Destination,
        client: SourceClient,
        link: PooledLink,
        reconnect: Callable[[], PooledLink],
        *,
        owner: Hashable,
        stats: MoveStats,
    ) -> None:
        self.link = link
        self._reconnect = reconnect
        self._destination = destination
        self._client = client
        self._owner = owner
        self._stats = stats
        self._namespaces: Mapping[bytes, NamespaceInfo] = {
            info.digest: info for info in client.welcome.namespaces
        }

    def receive(self, keys: Sequence[ChunkKey], timeout_s: float) -> None:
        """Have these chunks in memory.

        Raises TransportError and OperationFailed; chunks that arrived before stay.
        """
        engine, stats = self._destination.engine, self._stats
        missing = engine.memory_tier.references.acquire(keys, self._owner)
        absent = set(missing)
        stats.add_arrived([key for key in keys if key not in absent])
        if not missing:
            return
        leased = self._client.lease(missing, self.link.transport)
        stats.gone += len(missing) - len(leased.descriptors)
        if not leased.lease:
            return
        reserved = self._reserve(leased)
        if reserved and (corrupt := self._read(leased, reserved, timeout_s)):
            self._client.verify(corrupt)
            stats.retry += corrupt
        self._client.release(leased.lease)

    def _reserve(self, leased: Leased) -> list[_Expected]:
        """Reserve memory for leased chunks; returns those that there is memory for."""
        stats = self._stats
        reservations = self._destination.engine.transfers.reserve(
            leased.descriptors, self._namespaces, self._owner, self._destination.get_codec
        )
        granted: list[_Expected] = []
        for number, (descriptor, reservation) in enumerate(
            zip(leased.descriptors, reservations, strict=True)
        ):
            match reservation.status:
                case "granted":
                    granted.append(_Expected(number, descriptor, reservation))
                case "present":
                    stats.add_present([descriptor.key])
                case "storing":
                    stats.retry.append(descriptor.key)
                case "full":
                    stats.full = True
                case "unfit":
                    stats.failures[reservation.why] += 1
        return granted

    def _read(
        self, leased: Leased, expected: Sequence[_Expected], timeout_s: float
    ) -> list[ChunkKey]:
        """Read, verify and commit chunks; returns those whose checksums did not match."""
        reading = _Reading(self._destination, expected)
        begin = time.monotonic()
        unsettled: Callable[[], bool] | None = None
        try:
            self._read_into(reading, leased, [each.number for each in expected], timeout_s)
        except TransferTimeout as error:
            unsettled = error.settled
            raise
        finally:
            self._stats.seconds += time.monotonic() - begin
            reading.finish()
            self._stats.nbytes += reading.nbytes
            self._stats.add_arrived(reading.committed)
            self._stats.failures.update(reading.undecodable)
            self._abandon(reading.open_tickets(), unsettled)
        return reading.corrupt

    def _abandon(self, tickets: Sequence[int], unsettled: Callable[[], bool] | None) -> None:
        """Free reservations, or quarantine them while bytes may still be written to them."""
        if tickets and unsettled:
            self._destination.quarantine.add(self.link.transport, unsettled, tickets)
            return
        for ticket in tickets:
            self._destination.engine.transfers.abort(ticket)

    def _read_into(
        self, reading: _Reading, leased: Leased, numbers: Sequence[int], timeout_s: float
    ) -> None:
        total = sum(region.nbytes for region in reading.regions)
        timeout_s = min(timeout_s, STALL_S + total / SLOWEST_BYTES_PER_S)
        offer = leased.offer if len(numbers) == len(leased.descriptors) else b""
        while True:
            offer = offer or self._client.read_offer(leased.lease, self.link.transport, numbers)
            try:
                for result in self.link.link.read(offer, reading.regions, timeout_s):
                    reading.add(result)
            except TransferTimeout:
                raise
            except TransportError:
                # The peer may have closed a link that was idle for long.
                if not self.link.used or reading.started:
                    raise
                self.link.link.close()
                self.link, offer = self._reconnect(), b""
            else:
                self.link.used = True
                return


class _Expected(NamedTuple):
    """A chunk to read: its number in the lease, and the memory reserved for it."""

    number: int
    descriptor: ChunkDescriptor
    reservation: Reservation


class _Reading:
    """Chunks being read. Each payload is verified on the hashing thread, in order of arrival."""

    def __init__(self, destination: Destination, expected: Sequence[_Expected]) -> None:
        self.regions: list[Region] = [
            region for each in expected for region in each.reservation.regions
        ]
        self.committed: list[ChunkKey] = []
        self.corrupt: list[ChunkKey] = []
        self.undecodable: Counter[str] = Counter()
        self.nbytes = 0
        self.started = False
        self._destination = destination
        self._payloads = [
            (at, rank)
            for at, each in enumerate(expected)
            for rank in range(len(each.reservation.regions))
        ]
        self._expected = expected
        self._missing = [len(each.reservation.regions) for each in expected]
        self._open = dict.fromkeys(range(len(expected)))
        self._rejected: set[int] = set()
        self._last = destination.hashing.submit(lambda: None)

    def add(self, result: ReadResult) -> None:
        """Have a region verified that was read."""
        self.started = True
        self.nbytes += self.regions[result.number].nbytes
        self._last = self._destination.hashing.submit(self._verify, result)

    def finish(self) -> None:
        """Wait until all that was read is verified."""
        self._last.result()

    def open_tickets(self) -> list[int]:
        """Return the tickets of chunks that were not committed.

        Until the read has ended, bytes may still be written to their regions.
        """
        return [self._expected[at].reservation.ticket for at in self._open]

    def _verify(self, result: ReadResult) -> None:
        at, rank = self._payloads[result.number]
        expected = self._expected[at]
        if at in self._rejected or not self._is_sound(at, rank, result.checksum):
            return
        self._missing[at] -= 1
        if not self._missing[at]:
            del self._open[at]
            if self._destination.engine.transfers.commit(expected.reservation.ticket):
                self.committed.append(expected.descriptor.key)

    def _is_sound(self, at: int, rank: int, checksum: int | None) -> bool:
        _, descriptor, reservation = self._expected[at]
        with self._destination.engine.memory.view(reservation.regions[rank]) as view:
            if checksum is None:
                checksum = xxh3_64_intdigest(view)
            intact = checksum == descriptor.extents[rank].checksum
            codec = reservation.codec
            undecodable = check_blob(codec, view) if intact and codec else ""
        if not intact:
            self.corrupt.append(descriptor.key)
        if undecodable:
            self.undecodable[undecodable] += 1
        if undecodable or not intact:
            self._rejected.add(at)
        return intact and not undecodable
