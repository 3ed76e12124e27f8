"""Lookups: what they found, and the wait for what is being decoded for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.cache.records import Match
from lmcache_kit.keys import TOKEN_BYTES

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import MemoryIndex
    from lmcache_kit.cache.index.entries import Entry
    from lmcache_kit.cache.index.leases import Leases
    from lmcache_kit.cache.memory.decoding import Decoder, Decoding
    from lmcache_kit.cache.records import Located
    from lmcache_kit.cache.tiers.promotion import Promotion


class Query(NamedTuple):
    """What is looked for: packed ``tokens`` in a namespace of this shape."""

    namespace: bytes
    tokens: bytes
    chunk_size: int
    world_size: int


Walk: TypeAlias = "list[tuple[Located, Entry]]"
"""Chunks from the first one on, as far as there are any."""


@dataclass(slots=True, eq=False)
class Search:
    """A lookup under way. ``promotion``: what has to come before anything is looked for in memory.
    ``copies``: raw ones that it waits for, by the chunk's place in ``found``; ``waiting``: how
    much has not ended. ``on_ready`` is called once, under the engine's lock and from any thread,
    when the last of it ends."""

    query: Query
    owner: Hashable
    on_ready: Callable[[], None]
    promotion: Promotion | None = None
    lease: int = 0
    found: Walk = field(default_factory=list)
    copies: dict[int, Decoding] = field(default_factory=dict)
    waiting: int = 0

    def one_ended(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            self.on_ready()


class Lookups:
    """Finds and leases. Called under the engine's lock."""

    def __init__(
        self, index: MemoryIndex, leases: Leases, decoder: Decoder, counters: Counter[str]
    ) -> None:
        self._index = index
        self._leases = leases
        self._decoder = decoder
        self._counters = counters

    def walk(self, query: Query) -> Walk:
        """What is in memory now. Raises ValueError when the namespace has another shape."""
        namespace = self._index.namespace(query.namespace, query.chunk_size, query.world_size)
        return self._index.walk(namespace, query.tokens) if namespace else []

    def begin(self, search: Search, walk: Walk) -> None:
        """Lease what is found; have decoded what is encoded, up to where there is no room."""
        self._counters["lookups_total"] += 1
        self._counters["lookup_tokens_total"] += len(search.query.tokens) // TOKEN_BYTES
        search.found = found = walk
        if any(entry.payload.encoding for _, entry in found):
            self._copy_encoded(search)
        for located, _ in reversed(found):
            self._index.policy.touched(located.key)
        if found:
            payloads = [entry.payload for _, entry in found]
            for at, copy in search.copies.items():
                payloads[at] = copy.raw
            search.lease = self._leases.grant(payloads, search.query.world_size, search.owner)
        for copy in search.copies.values():
            self._decoder.start(copy)
            if copy.state == "running":
                search.waiting += 1
                copy.waiters.append(search.one_ended)

    def finish(self, search: Search) -> Match:
        """What can be read now; a chunk that is not decoded yet, or cannot be, cuts the prefix."""
        if not search.found:
            return Match(0, ())
        chunks: list[Located] = []
        for at, (located, _) in enumerate(search.found):
            copy = search.copies.get(at)
            if copy is None:
                chunks.append(located)
            elif copy.state == "done":
                chunks.append(located._replace(extents=copy.raw.extents))
            else:
                self._counters["decode_late_total"] += copy.state == "running"
                break
        if search.copies:
            gone = self._leases.cut(search.lease, len(chunks))
            if gone is None:  # its owner died while it waited
                return Match(0, ())
            for payload in gone:
                self._index.release_if_unused(payload)
        if not chunks:
            return Match(0, ())
        self._counters["hit_tokens_total"] += chunks[-1].end
        return Match(search.lease, tuple(chunks))

    def _copy_encoded(self, search: Search) -> None:
        keep = {located.key for located, _ in search.found}
        encodings = [entry.payload.encoding for _, entry in search.found]
        wanted = sum([c.payload_bytes for each in encodings if each for c in each.chunks])
        evictor = Evictor(self._index, self._counters, keep, wanted)
        for at, (_, entry) in enumerate(search.found):
            if entry.payload.encoding:
                copy = self._decoder.copy_of(entry, evictor)
                if copy is None:
                    self._counters["decode_no_room_total"] += 1
                    del search.found[at:]
                    return
                search.copies[at] = copy
