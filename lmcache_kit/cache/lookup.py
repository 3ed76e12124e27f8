"""Lookups: the longest stored prefix of a prompt, from the match in memory to a lease.

A lookup passes through these states, under the engine's lock:

- ``matching``: one walk of the memory index. If a store tier may have what follows, chunks are
  promoted first; otherwise the match is leased, and encoded chunks in it are decoded.
- ``promoting``: the match is referenced. When the promotion ends, the walk is repeated.
- ``decoding``: raw copies of encoded chunks are made; the lease holds them.
- ``ready``: every chunk can be read. ``on_ready`` is called if the lookup had to wait.
- ``expired``: the caller came before that. The match ends at the first chunk that is not raw.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

from lmcache_kit.cache.index.chunk_index import Walk
from lmcache_kit.cache.index.entries import Decoding
from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.cache.memory.memory_tier import MemoryTier
from lmcache_kit.cache.records import Located, Match, Query
from lmcache_kit.cache.tiers.promotion import Promotion, Promotions
from lmcache_kit.keys import TOKEN_BYTES


@dataclass(slots=True, eq=False)
class PendingLookup:
    """A lookup under way. ``on_ready`` is called at most once, under the lock, from any thread.

    ``copies``: the decodings that it reads, by their place in ``found``. ``undecoded``: how many
    of them have not ended.
    """

    query: Query
    owner: Hashable
    on_ready: Callable[[], None]
    state: Literal["matching", "promoting", "decoding", "ready", "expired"] = "matching"
    promotion: Promotion | None = None
    lease: int = 0
    found: Walk = field(default_factory=list)
    copies: dict[int, Decoding] = field(default_factory=dict)
    undecoded: int = 0

    @property
    def waiting(self) -> bool:
        """Whether ``on_ready`` is still to be called."""
        return self.state in {"promoting", "decoding"}


class Lookups:
    """The state machine of lookups in ``memory``. Called under its lock."""

    def __init__(self, memory: MemoryTier) -> None:
        self.promotions: Promotions | None = None
        self._state = memory.state
        self._index = memory.state.index
        self._leases = memory.state.leases
        self._decoder = memory.decoder
        self._counters = memory.state.counters

    def begin(self, lookup: PendingLookup) -> None:
        """Match, and begin to promote or decode. Raises ValueError for a namespace of another
        shape."""
        found = self._match(lookup.query)
        if self.promotions is not None:
            lookup.promotion = self.promotions.begin(
                lookup.query, lookup.owner, found, lambda ended: self._promoted(lookup, ended)
            )
        if lookup.promotion:
            lookup.state = "promoting"
        else:
            self._lease(lookup, found)

    def finish(self, lookup: PendingLookup) -> Match:
        """Return the chunks that can be read now, and release the others."""
        if lookup.promotion and self.promotions:
            # promoting -> decoding, with what has been promoted until now.
            self.promotions.expire(lookup.promotion)
            lookup.promotion = None
            self._lease(lookup, self._match(lookup.query))
        if lookup.state == "decoding":
            lookup.state = "expired"
        if not lookup.found:
            return Match(0, ())
        chunks = self._readable(lookup)
        if lookup.copies and not self._leases.keep_first(lookup.lease, len(chunks)):
            return Match(0, ())  # the owner died while the lookup waited
        if not chunks:
            return Match(0, ())
        self._counters["hit_tokens_total"] += chunks[-1].end
        return Match(lookup.lease, tuple(chunks))

    def _match(self, query: Query) -> Walk:
        namespace = self._index.namespace(query.namespace, query.chunk_size, query.world_size)
        return self._index.walk(namespace, query.tokens) if namespace else []

    def _promoted(self, lookup: PendingLookup, promotion: Promotion) -> None:
        # promoting -> decoding or ready. An orphan is not leased: its owner cannot release it.
        lookup.promotion = None
        lookup.state = "ready"
        if promotion.state != "orphaned":
            self._lease(lookup, self._match(lookup.query))
        if not lookup.waiting:
            lookup.on_ready()

    def _lease(self, lookup: PendingLookup, found: Walk) -> None:
        """Lease a match and start the decoding of encoded chunks, up to where there is room."""
        self._counters["lookups_total"] += 1
        self._counters["lookup_tokens_total"] += len(lookup.query.tokens) // TOKEN_BYTES
        lookup.found = found
        if any(entry.payload.encoding for _, entry in found):
            self._copy_encoded(lookup)
        self._index.touch(found)
        if found:
            payloads = [entry.payload for _, entry in found]
            for at, copy in lookup.copies.items():
                payloads[at] = copy.raw
            lookup.lease = self._leases.grant(payloads, lookup.query.world_size, lookup.owner)
        for copy in lookup.copies.values():
            self._decoder.start(copy)
            if copy.state == "running":
                lookup.undecoded += 1
                copy.waiters.append(lambda: self._decoded(lookup))
        lookup.state = "decoding" if lookup.undecoded else "ready"

    def _decoded(self, lookup: PendingLookup) -> None:
        lookup.undecoded -= 1
        if not lookup.undecoded and lookup.state == "decoding":
            lookup.state = "ready"
            lookup.on_ready()

    def _readable(self, lookup: PendingLookup) -> list[Located]:
        """Return the match up to the first chunk that is not decoded, or cannot be."""
        chunks: list[Located] = []
        for at, (located, _) in enumerate(lookup.found):
            copy = lookup.copies.get(at)
            if copy is None:
                chunks.append(located)
            elif copy.state == "done":
                chunks.append(located._replace(extents=copy.raw.extents))
            else:
                self._counters["decode_late_total"] += copy.state == "running"
                break
        return chunks

    def _copy_encoded(self, lookup: PendingLookup) -> None:
        keep = {located.key for located, _ in lookup.found}
        encodings = [entry.payload.encoding for _, entry in lookup.found]
        wanted = sum([c.payload_bytes for each in encodings if each for c in each.chunks])
        evictor = Evictor(self._state, keep, wanted)
        for at, (_, entry) in enumerate(lookup.found):
            if entry.payload.encoding:
                copy = self._decoder.copy_of(entry, evictor)
                if copy is None:
                    self._counters["decode_no_room_total"] += 1
                    del lookup.found[at:]
                    return
                lookup.copies[at] = copy
