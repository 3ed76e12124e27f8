"""The shelf: which chunks there are at one location, and who follows whom; in memory, also where
they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache_kit.cache.index.entries import (
    Children,
    Entry,
    NamespaceState,
    PartialChunk,
    Payload,
    big_endian,
)
from lmcache_kit.cache.records import Located
from lmcache_kit.keys import TOKEN_BYTES, chain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache_kit.cache.descriptors import NamespaceInfo
    from lmcache_kit.cache.records import ChangeListener, StoredChunk
    from lmcache_kit.interfaces import EvictionPolicy, MemoryBackend, Region
    from lmcache_kit.keys import ChunkKey


class ChunkIndex:
    """Keeps entries, the policy and the listeners in step with each other.

    An entry is *linked* from :meth:`put` to :meth:`unlink`; listeners and policy know it from
    :meth:`complete` on. ``encoded`` counts the entries whose body is.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.entries: dict[ChunkKey, Entry] = {}
        self.pending: dict[ChunkKey, Entry] = {}
        self.children: dict[ChunkKey, Children] = {}
        self.spaces: dict[bytes, NamespaceState] = {}
        self.listeners: list[ChangeListener] = []
        self.encoded = 0
        self._pending_children: dict[ChunkKey, int] = {}

    def space(self, digest: bytes, chunk_size: int, world_size: int) -> NamespaceState | None:
        """The namespace, if it has chunks here. Raises ValueError when the shape differs."""
        space = self.spaces.get(digest)
        if space and (space.chunk_size, space.world_size) != (chunk_size, world_size):
            raise ValueError(
                f"namespace {digest.hex()[:16]} has chunk_size {space.chunk_size} and world_size "
                f"{space.world_size} here; this request says {chunk_size} and {world_size}"
            )
        return space

    def space_of(self, info: NamespaceInfo) -> NamespaceState:
        """The namespace that ``info`` describes, whether it has chunks here or not, with the forms
        that were not known. Raises ValueError when the shape differs."""
        space = self.space(info.digest, info.chunk_size, info.world_size)
        space = space or NamespaceState(info.digest, info.chunk_size, info.world_size)
        for rank, form in info.forms:
            space.forms.setdefault(rank, form)
        return space

    def records(self) -> list[StoredChunk]:
        """All complete chunks."""
        return [entry.record for entry in self.entries.values() if entry.complete]

    def walk(
        self, space: NamespaceState, tokens: bytes, start: int = 0, parent: ChunkKey = b""
    ) -> list[tuple[Located, Entry]]:
        """The longest stored prefix of packed ``tokens``, chunk by chunk from the first, or from
        the token ``start`` on, which follows the chunk ``parent``.

        Compares tokens, not keys, so the chunk after the last full match counts for as many of
        its first tokens as agree.
        """
        order = big_endian(tokens)
        step = space.chunk_size * TOKEN_BYTES
        parent = parent or space.root
        found: list[tuple[Located, Entry]] = []
        for at in range(start * TOKEN_BYTES, len(order), step):
            children = self.children.get(parent)
            if children is None:
                break
            entry, usable = children.longest(order[at : at + step])
            if not usable or entry.space is not space:
                break
            located = Located(
                entry.key, at // TOKEN_BYTES, usable, entry.tokens, entry.body.extents
            )
            found.append((located, entry))
            if usable < space.chunk_size:
                break
            parent = entry.key
        return found

    def select(self, digests: Iterable[bytes] | None, tokens: bytes | None) -> list[PartialChunk]:
        """The longest stored prefix of packed ``tokens`` in each of these namespaces, or in all
        (None); without tokens, all complete chunks there."""
        spaces = self._named(digests)
        if tokens is not None:
            walks = [self.walk(space, tokens) for space in spaces]
            return [
                PartialChunk(entry, located.usable) for walk in walks for located, entry in walk
            ]
        return [
            PartialChunk(entry, entry.tokens)
            for entry in self.entries.values()
            if entry.complete and entry.space in spaces
        ]

    def holding(self, digests: Iterable[bytes] | None, tokens: bytes) -> list[Entry]:
        """Complete chunks, also behind holes, that hold only KV of packed ``tokens`` or that of
        the last of them and then more; not those that go on otherwise."""
        found: list[Entry] = []
        for space in self._named(digests):
            for link in chain(space.digest, tokens, space.chunk_size):
                order = big_endian(tokens[link.start * TOKEN_BYTES : link.end * TOKEN_BYTES])
                found += [
                    entry
                    for entry in self.children.get(link.parent, ())
                    if entry.space is space
                    and (order.startswith(entry.order) or entry.order.startswith(order))
                ]
        return found

    def put(self, entry: Entry) -> None:
        """A chunk begins to be stored."""
        self.entries[entry.key] = entry
        self.pending[entry.key] = entry
        self._pending_children[entry.parent] = self._pending_children.get(entry.parent, 0) + 1
        self.spaces.setdefault(entry.space.digest, entry.space).entries += 1
        self.encoded += entry.body.encoding is not None

    def complete(self, entry: Entry) -> None:
        """It is sealed: the chunk can be found."""
        self._no_longer_pending(entry)
        self.children.setdefault(entry.parent, Children()).add(entry)
        self.policy.added(entry.key)
        for listener in self.listeners:
            listener.added(entry.record)

    def unlink(self, entry: Entry) -> None:
        """Nobody finds it from now on; its memory is freed when nobody uses it."""
        if not entry.linked:
            return
        entry.linked = False
        del self.entries[entry.key]
        entry.space.entries -= 1
        if not entry.space.entries:
            del self.spaces[entry.space.digest]
        if entry.complete:
            siblings = self.children[entry.parent]
            siblings.remove(entry)
            if not len(siblings):
                del self.children[entry.parent]
            self.policy.removed(entry.key)
            for listener in self.listeners:
                listener.removed(entry.key)
        else:
            self._no_longer_pending(entry)
        self.forsake(entry)

    def adopt(self, entry: Entry, body: Payload) -> None:
        """From now on the entry, whose last body was forsaken, consists of this one."""
        body.kept = True
        entry.body = body
        self.encoded += body.encoding is not None

    def forsake(self, entry: Entry) -> None:
        """The entry's body goes when nobody uses it any more."""
        entry.body.kept = False
        self.encoded -= entry.body.encoding is not None

    def followers(self, key: ChunkKey) -> int:
        """How many chunks, pending ones too, have this one as their parent."""
        children = self.children.get(key)
        stored = len(children) if children else 0
        return stored + self._pending_children.get(key, 0)

    def _named(self, digests: Iterable[bytes] | None) -> list[NamespaceState]:
        if digests is None:
            return list(self.spaces.values())
        return [self.spaces[digest] for digest in digests if digest in self.spaces]

    def _no_longer_pending(self, entry: Entry) -> None:
        del self.pending[entry.key]
        left = self._pending_children[entry.parent] - 1
        if left:
            self._pending_children[entry.parent] = left
        else:
            del self._pending_children[entry.parent]


class MemoryIndex(ChunkIndex):
    """A shelf that frees the memory of what leaves it."""

    def __init__(self, memory: MemoryBackend, policy: EvictionPolicy) -> None:
        super().__init__(policy)
        self.memory = memory
        self.capacity_bytes = memory.usage().capacity_bytes
        self._at: dict[int, Entry] = {}

    def put(self, entry: Entry) -> None:
        super().put(entry)
        self._own(entry)

    def adopt(self, entry: Entry, body: Payload) -> None:
        super().adopt(entry, body)
        self._own(entry)

    def forsake(self, entry: Entry) -> None:
        super().forsake(entry)
        for region in entry.body.regions:
            self._at.pop(region.offset, None)
        self.settle(entry.body)

    def replace_region(self, entry: Entry, rank: int, region: Region) -> None:
        """A rank needs another size than was set aside for it."""
        self.free(entry.body.regions[rank])
        entry.body.regions[rank] = region
        self._own(entry)

    def settle(self, body: Payload) -> None:
        """Free the memory of a body that is neither kept nor in use."""
        if not body.kept and not body.holds:
            for region in body.regions:
                self.free(region)
            body.regions = []

    def free(self, region: Region) -> None:
        self._at.pop(region.offset, None)
        self.memory.free(region)

    def owner_of(self, region: Region) -> Entry | None:
        """The linked entry whose memory this is. None for memory that is just being handed out,
        or of bodies that are used only until their readers are done."""
        return self._at.get(region.offset)

    def _own(self, entry: Entry) -> None:
        for region in entry.body.regions:
            self._at[region.offset] = entry
