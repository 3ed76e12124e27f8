"""Lookups: what they found, and the wait for what is being decoded for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_kit.cache.records import Match
from lmcache_kit.cache.room import Room
from lmcache_kit.keys import TOKEN_BYTES

if TYPE_CHECKING:
    from lmcache_kit.cache.entries import Entry, Space
    from lmcache_kit.cache.leases import Leases
    from lmcache_kit.cache.records import Located
    from lmcache_kit.cache.shelf import Shelf
    from lmcache_kit.cache.unpacking import Unpacker, Unpacking


@dataclass(slots=True, eq=False)
class Search:
    """A lookup under way. ``copies``: raw ones that it waits for, by the chunk's place in
    ``found``; ``waiting``: how many of them have not ended. ``on_ready`` is called once, under
    the engine's lock and from any thread, when the last of these ends."""

    on_ready: Callable[[], None]
    lease: int = 0
    found: list[tuple[Located, Entry]] = field(default_factory=list)
    copies: dict[int, Unpacking] = field(default_factory=dict)
    waiting: int = 0

    def one_ended(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            self.on_ready()


class Lookups:
    """Finds and leases. Called under the engine's lock."""

    def __init__(
        self, shelf: Shelf, leases: Leases, unpacker: Unpacker, counters: Counter[str]
    ) -> None:
        self._shelf = shelf
        self._leases = leases
        self._unpacker = unpacker
        self._counters = counters

    def begin(
        self, space: Space | None, tokens: bytes, owner: Hashable, on_ready: Callable[[], None]
    ) -> Search:
        """Lease what is found; have decoded what is encoded, up to where there is no room."""
        self._counters["lookups_total"] += 1
        self._counters["lookup_tokens_total"] += len(tokens) // TOKEN_BYTES
        search = Search(on_ready)
        if space is None:
            return search
        search.found = found = self._shelf.walk(space, tokens)
        if any(entry.body.encoding for _, entry in found):
            self._copy_encoded(search)
        for located, _ in reversed(found):
            self._shelf.policy.touched(located.key)
        if found:
            bodies = [entry.body for _, entry in found]
            for at, copy in search.copies.items():
                bodies[at] = copy.raw
            search.lease = self._leases.grant(bodies, space.world_size, owner)
        for copy in search.copies.values():
            self._unpacker.start(copy)
            if copy.state == "running":
                search.waiting += 1
                copy.waiters.append(search.one_ended)
        return search

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
            for body in gone:
                self._shelf.settle(body)
        if not chunks:
            return Match(0, ())
        self._counters["hit_tokens_total"] += chunks[-1].end
        return Match(search.lease, tuple(chunks))

    def _copy_encoded(self, search: Search) -> None:
        keep = {located.key for located, _ in search.found}
        encodings = [entry.body.encoding for _, entry in search.found]
        wanted = sum([c.payload_bytes for each in encodings if each for c in each.chunks])
        room = Room(self._shelf, self._counters, keep, wanted)
        for at, (_, entry) in enumerate(search.found):
            if entry.body.encoding:
                copy = self._unpacker.copy_of(entry, room)
                if copy is None:
                    self._counters["decode_no_room_total"] += 1
                    del search.found[at:]
                    return
                search.copies[at] = copy
