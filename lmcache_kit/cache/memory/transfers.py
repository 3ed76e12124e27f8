"""Transfers: chunks that leave for another cache, and chunks that come from one.

The move that brought a chunk in references it until the move ends. So there is a copy here before
the one at the other end is deleted.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.descriptors import ChunkDescriptor, Encoding, NamespaceInfo, Reservation
from lmcache_kit.cache.index.entries import Entry, Payload, ResolvedEncoding, big_endian
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.cache.memory.memory_index import MemoryIndex
from lmcache_kit.errors import CodecError, KitError
from lmcache_kit.interfaces.codec import Codec
from lmcache_kit.keys import TOKEN_BYTES, ChunkKey

GetCodec = Callable[[str], Codec]
"""The codec of this name. Raises KitError when it cannot be had."""


class _Incoming(NamedTuple):
    """A chunk whose bytes are on their way, and the owner of its move."""

    entry: Entry
    owner: Hashable


class Transfers:
    """Both ends of moves, on one memory tier. Thread-safe.

    An *owner* is one move, or one peer that reads. ``counted_as``: the stem of the counters of
    chunks that come in.
    """

    def __init__(self, state: TierState[MemoryIndex], counted_as: str = "moved_in") -> None:
        self._counted_as = counted_as
        self._state = state
        self._index = state.index
        self._references = state.references
        self._leases = state.leases
        self._counters = state.counters
        self._lock = state.lock
        self._clock = state.clock
        self._tickets = count(1 + secrets.randbits(48))
        self._incoming: dict[int, _Incoming] = {}

    # The end that gives.

    def lease(self, keys: Sequence[ChunkKey], owner: Hashable) -> tuple[int, list[ChunkDescriptor]]:
        """Lease those of these chunks that are still here, and describe them.

        The lease is 0 if there are none; it ends as one of a lookup does.
        """
        with self._lock:
            entries = [self._index.entries.get(key) for key in keys]
            there = [entry for entry in entries if entry is not None and entry.complete]
            if not there:
                return 0, []
            lease = self._leases.grant([entry.payload for entry in there], 1, owner)
            return lease, [_descriptor(entry) for entry in there]

    def recheck(self, keys: Sequence[ChunkKey]) -> int:
        """Drop those of these chunks whose bytes are damaged; returns how many."""
        dropped = 0
        for key in keys:
            with self._lock:
                entry = self._index.entries.get(key)
                if entry is None or not entry.complete:
                    continue
                payload = entry.payload
                payload.ref_count += 1
            sound = self._is_intact(payload)
            with self._lock:
                payload.ref_count -= 1
                if not sound and entry.linked and entry.payload is payload:
                    self._counters["corrupt_total"] += 1
                    self._index.unlink(entry)
                    dropped += 1
                self._index.release_if_unused(payload)
        return dropped

    # The end that takes.

    def reserve(
        self,
        descriptors: Sequence[ChunkDescriptor],
        namespaces: Mapping[bytes, NamespaceInfo],
        owner: Hashable,
        get_codec: GetCodec,
    ) -> list[Reservation]:
        """Reserve memory for chunks, evicting others for them; one reservation each, in order.

        After the first one for which there is no room all others are ``full`` too.
        """
        codecs = [_codec(descriptor, namespaces, get_codec) for descriptor in descriptors]
        with self._lock:
            keep = {descriptor.key for descriptor in descriptors} | {
                descriptor.parent for descriptor in descriptors
            }
            wanted_bytes = sum([descriptor.nbytes for descriptor in descriptors])
            evictor = Evictor(self._state, keep, wanted_bytes)
            reservations: list[Reservation] = []
            full = False
            for descriptor, codec in zip(descriptors, codecs, strict=True):
                reservation = self._reserve_one(
                    descriptor, namespaces, owner, codec, None if full else evictor
                )
                full = full or reservation.status == "full"
                reservations.append(reservation)
            return reservations

    def commit(self, ticket: int) -> bool:
        """Publish a chunk whose bytes have all arrived and were verified; its owner references it.

        False when the chunk was given up meanwhile.
        """
        with self._lock:
            coming = self._incoming.pop(ticket, None)
            if coming is None:
                return False
            entry = coming.entry
            entry.payload.ref_count -= 1
            if not entry.linked:
                self._index.release_if_unused(entry.payload)
                return False
            entry.mark_complete()
            self._index.complete(entry)
            self._references.acquire_entry(entry, coming.owner)
            self._counters[f"{self._counted_as}_chunks_total"] += 1
            self._counters[f"{self._counted_as}_bytes_total"] += entry.nbytes
            return True

    def quarantine(self, ticket: int) -> int:
        """Give a chunk up of which bytes may still arrive. Its memory is not reused until
        :meth:`abort`. Returns its size in bytes."""
        with self._lock:
            coming = self._incoming.get(ticket)
            if coming is None:
                return 0
            nbytes = coming.entry.nbytes
            self._index.unlink(coming.entry)
            return nbytes

    def abort(self, ticket: int) -> None:
        """Give a chunk up, and free its memory: no byte of it will arrive. Safe to call twice."""
        with self._lock:
            coming = self._incoming.pop(ticket, None)
            if coming is not None:
                self._index.unlink(coming.entry)
                coming.entry.payload.ref_count -= 1
                self._index.release_if_unused(coming.entry.payload)
                self._state.notify()

    def _is_intact(self, payload: Payload) -> bool:
        for region, extent in zip(payload.regions, payload.extents, strict=True):
            with self._index.memory.view(region) as view:
                if xxh3_64_intdigest(view) != extent.checksum:
                    return False
        return True

    def _reserve_one(
        self,
        descriptor: ChunkDescriptor,
        namespaces: Mapping[bytes, NamespaceInfo],
        owner: Hashable,
        codec: Codec | str | None,
        evictor: Evictor | None,
    ) -> Reservation:
        if isinstance(codec, str):
            return Reservation("unfit", why=codec)
        entry = self._index.entries.get(descriptor.key)
        if entry is not None and entry.complete:
            self._references.acquire_entry(entry, owner)
            return Reservation("present")
        if entry is not None:
            return Reservation("storing")
        try:
            namespace = self._index.namespace_of(namespaces[descriptor.namespace])
        except ValueError as error:
            return Reservation("unfit", why=str(error))
        regions = (
            evictor.take_all([e.nbytes for e in descriptor.extents]) if evictor is not None else []
        )
        if not regions:
            return Reservation("full")
        encoding = None
        if descriptor.encoding is not None and codec is not None:
            given = descriptor.encoding
            encoding = ResolvedEncoding(given.method, given.version, codec, given.chunks)
        payload = Payload(regions, encoding, ref_count=1)
        entry = descriptor.new_entry(namespace, payload, self._clock())
        entry.claimed = set(range(namespace.world_size))
        entry.checksums = {rank: each.checksum for rank, each in enumerate(descriptor.extents)}
        self._index.put(entry)
        ticket = next(self._tickets)
        self._incoming[ticket] = _Incoming(entry, owner)
        return Reservation("granted", ticket, tuple(regions), codec)


def _descriptor(entry: Entry) -> ChunkDescriptor:
    resolved = entry.payload.encoding
    encoding = resolved and Encoding(resolved.method, resolved.version, resolved.chunks)
    return ChunkDescriptor(
        entry.key,
        entry.namespace.digest,
        entry.parent,
        big_endian(entry.sort_key),
        entry.start,
        entry.payload.extents,
        encoding,
    )


def _codec(
    descriptor: ChunkDescriptor, namespaces: Mapping[bytes, NamespaceInfo], get_codec: GetCodec
) -> Codec | str | None:
    """Return the codec of a descriptor, None for a raw one, or why it cannot be kept here."""
    info = namespaces.get(descriptor.namespace)
    if info is None or not descriptor.is_sound(info):
        return "it is not what its key says"
    encoding = descriptor.encoding
    if encoding is None:
        return _unlike_its_layout(descriptor, info) or None
    if len(encoding.chunks) != info.world_size:
        return f"its encoding names {len(encoding.chunks)} ranks of {info.world_size}"
    try:
        codec = get_codec(encoding.method)
    except KitError as error:
        return f"it is encoded with {encoding.method}: {error}"
    if codec.format_version != encoding.version:
        return (
            f"it is encoded with version {encoding.version} of {encoding.method}'s format, and "
            f"this side reads {codec.format_version}"
        )
    return codec


def _unlike_its_layout(descriptor: ChunkDescriptor, info: NamespaceInfo) -> str:
    tokens = len(descriptor.tokens) // TOKEN_BYTES
    for rank, rank_layout in info.rank_layouts:
        try:
            expected = rank_layout.layout.payload_bytes(tokens)
        except KeyError:
            return f"rank {rank} stores {rank_layout.layout.dtype!r}, which is not known"
        if rank < len(descriptor.extents) and descriptor.extents[rank].nbytes != expected:
            return f"rank {rank} has {descriptor.extents[rank].nbytes} bytes of {expected}"
    return ""


def check_blob(codec: Codec, blob: memoryview) -> str:
    """Return why these encoded bytes cannot be decoded here; empty if they can."""
    try:
        codec.describe(blob)
    except CodecError as error:
        return str(error)
    return ""
