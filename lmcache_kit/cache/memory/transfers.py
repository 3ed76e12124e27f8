"""Chunks that leave for another cache, and chunks that come from one.

A chunk that came in is anchored until its mover lets go, so that there is a copy here while the one
at the other end goes.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.descriptors import ChunkDescriptor, Encoding, NamespaceInfo, Reservation
from lmcache_kit.cache.index.entries import Entry, Payload, ResolvedEncoding, big_endian
from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.errors import CodecError, KitError
from lmcache_kit.keys import TOKEN_BYTES, ChunkKey

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import MemoryIndex
    from lmcache_kit.cache.index.leases import Leases
    from lmcache_kit.cache.index.references import References
    from lmcache_kit.interfaces.codec import Codec

GetCodec = Callable[[str], "Codec"]
"""The codec of this name. Raises KitError when it cannot be had."""


class _Coming(NamedTuple):
    """A chunk whose bytes are on their way, and who moves it."""

    entry: Entry
    owner: Hashable


class Transfers:
    """Both ends of moves, on one shelf. Thread-safe; an *owner* is one move, or one peer that
    takes. ``came``: the word that what comes is counted under."""

    def __init__(  # noqa: PLR0917 - parts of an engine
        self,
        shelf: MemoryIndex,
        anchors: References,
        leases: Leases,
        counters: Counter[str],
        lock: AbstractContextManager[object],
        clock: Callable[[], float],
        came: str = "moved_in",
    ) -> None:
        self._came = came
        self._shelf = shelf
        self._anchors = anchors
        self._leases = leases
        self._counters = counters
        self._lock = lock
        self._clock = clock
        self._tickets = count(1 + secrets.randbits(48))
        self._coming: dict[int, _Coming] = {}

    # The end that gives.

    def lend(self, keys: Sequence[ChunkKey], owner: Hashable) -> tuple[int, list[ChunkDescriptor]]:
        """Lease those of these chunks that are still here. The lease, 0 for none of them, ends as
        one of a lookup does."""
        with self._lock:
            entries = [self._shelf.entries.get(key) for key in keys]
            there = [entry for entry in entries if entry is not None and entry.complete]
            if not there:
                return 0, []
            lease = self._leases.grant([entry.body for entry in there], 1, owner)
            return lease, [_parcel(entry) for entry in there]

    def recheck(self, keys: Sequence[ChunkKey]) -> int:
        """Drop those of these chunks whose bytes are not what was stored; returns how many."""
        dropped = 0
        for key in keys:
            with self._lock:
                entry = self._shelf.entries.get(key)
                if entry is None or not entry.complete:
                    continue
                body = entry.body
                body.holds += 1
            sound = self._is_intact(body)
            with self._lock:
                body.holds -= 1
                if not sound and entry.linked and entry.body is body:
                    self._counters["corrupt_total"] += 1
                    self._shelf.unlink(entry)
                    dropped += 1
                self._shelf.settle(body)
        return dropped

    # The end that takes.

    def receive(
        self,
        parcels: Sequence[ChunkDescriptor],
        spaces: Mapping[bytes, NamespaceInfo],
        owner: Hashable,
        get_codec: GetCodec,
    ) -> list[Reservation]:
        """Memory for parcels, evicting for them what must go; one landing each, in order. After
        one for which there is no room all others are ``full`` too."""
        codecs = [_codec(parcel, spaces, get_codec) for parcel in parcels]
        with self._lock:
            keep = {parcel.key for parcel in parcels} | {parcel.parent for parcel in parcels}
            wanted_bytes = sum([parcel.nbytes for parcel in parcels])
            room = Evictor(self._shelf, self._counters, keep, wanted_bytes)
            landings: list[Reservation] = []
            full = False
            for parcel, codec in zip(parcels, codecs, strict=True):
                landing = self._land_at(parcel, spaces, owner, codec, None if full else room)
                full = full or landing.status == "full"
                landings.append(landing)
            return landings

    def landed(self, ticket: int) -> bool:
        """All bytes of a parcel are here and are what they should be: from now on it is found, and
        it is anchored for its owner. False when it was given up meanwhile."""
        with self._lock:
            coming = self._coming.pop(ticket, None)
            if coming is None:
                return False
            entry = coming.entry
            entry.body.holds -= 1
            if not entry.linked:
                self._shelf.settle(entry.body)
                return False
            entry.seal()
            self._shelf.complete(entry)
            self._anchors.hold(entry, coming.owner)
            self._counters[f"{self._came}_chunks_total"] += 1
            self._counters[f"{self._came}_bytes_total"] += entry.nbytes
            return True

    def strand(self, ticket: int) -> int:
        """A parcel will not come, but bytes of it still may: nobody finds it, and its memory is
        used for nothing else until :meth:`discard`. Returns how much that is."""
        with self._lock:
            coming = self._coming.get(ticket)
            if coming is None:
                return 0
            nbytes = coming.entry.nbytes
            self._shelf.unlink(coming.entry)
            return nbytes

    def discard(self, ticket: int) -> None:
        """A parcel will not come, and no byte of it will. Safe to call twice."""
        with self._lock:
            coming = self._coming.pop(ticket, None)
            if coming is not None:
                self._shelf.unlink(coming.entry)
                coming.entry.body.holds -= 1
                self._shelf.settle(coming.entry.body)

    def _is_intact(self, body: Payload) -> bool:
        for region, extent in zip(body.regions, body.extents, strict=True):
            with self._shelf.memory.view(region) as view:
                if xxh3_64_intdigest(view) != extent.checksum:
                    return False
        return True

    def _land_at(
        self,
        parcel: ChunkDescriptor,
        spaces: Mapping[bytes, NamespaceInfo],
        owner: Hashable,
        codec: Codec | str | None,
        room: Evictor | None,
    ) -> Reservation:
        if isinstance(codec, str):
            return Reservation("unfit", why=codec)
        entry = self._shelf.entries.get(parcel.key)
        if entry is not None and entry.complete:
            self._anchors.hold(entry, owner)
            return Reservation("present")
        if entry is not None:
            return Reservation("storing")
        try:
            space = self._shelf.space_of(spaces[parcel.namespace])
        except ValueError as error:
            return Reservation("unfit", why=str(error))
        regions = room.take_all([e.nbytes for e in parcel.extents]) if room is not None else []
        if not regions:
            return Reservation("full")
        encoding = None
        if parcel.packing is not None and codec is not None:
            packing = parcel.packing
            encoding = ResolvedEncoding(packing.method, packing.version, codec, packing.chunks)
        body = Payload(regions, encoding, holds=1)
        order = big_endian(parcel.tokens)
        entry = Entry(parcel.key, parcel.parent, space, order, parcel.start, body, self._clock())
        entry.claimed = set(range(space.world_size))
        entry.checksums = {rank: each.checksum for rank, each in enumerate(parcel.extents)}
        self._shelf.put(entry)
        ticket = next(self._tickets)
        self._coming[ticket] = _Coming(entry, owner)
        return Reservation("granted", ticket, tuple(regions), codec)


def _parcel(entry: Entry) -> ChunkDescriptor:
    encoding = entry.body.encoding
    packing = encoding and Encoding(encoding.method, encoding.version, encoding.chunks)
    return ChunkDescriptor(
        entry.key,
        entry.space.digest,
        entry.parent,
        big_endian(entry.order),
        entry.start,
        entry.body.extents,
        packing,
    )


def _codec(
    parcel: ChunkDescriptor, spaces: Mapping[bytes, NamespaceInfo], get_codec: GetCodec
) -> Codec | str | None:
    """The codec that a parcel needs, None for a raw one; or why it cannot be kept here."""
    info = spaces.get(parcel.namespace)
    if info is None or not parcel.is_sound(info):
        return "it is not what its key says"
    packing = parcel.packing
    if packing is None:
        return _unlike_its_form(parcel, info) or None
    if len(packing.chunks) != info.world_size:
        return f"its encoding names {len(packing.chunks)} ranks of {info.world_size}"
    try:
        codec = get_codec(packing.method)
    except KitError as error:
        return f"it is encoded with {packing.method}: {error}"
    if codec.format_version != packing.version:
        return (
            f"it is encoded with version {packing.version} of {packing.method}'s format, and "
            f"this side reads {codec.format_version}"
        )
    return codec


def _unlike_its_form(parcel: ChunkDescriptor, info: NamespaceInfo) -> str:
    tokens = len(parcel.tokens) // TOKEN_BYTES
    for rank, form in info.forms:
        try:
            expected = form.layout.payload_bytes(tokens)
        except KeyError:
            return f"rank {rank} stores {form.layout.dtype!r}, which is not known"
        if rank < len(parcel.extents) and parcel.extents[rank].nbytes != expected:
            return f"rank {rank} has {parcel.extents[rank].nbytes} bytes of {expected}"
    return ""


def check_blob(codec: Codec, blob: memoryview) -> str:
    """Why these encoded bytes cannot be decoded here; empty if their header says they can."""
    try:
        codec.describe(blob)
    except CodecError as error:
        return str(error)
    return ""
