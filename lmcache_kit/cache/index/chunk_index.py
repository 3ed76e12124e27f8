"""The index: which chunks there are at one location, and who follows whom; in memory, also where
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
    :meth:`complete` on. ``encoded`` counts the entries whose payload is.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.entries: dict[ChunkKey, Entry] = {}
        self.pending: dict[ChunkKey, Entry] = {}
        self.children: dict[ChunkKey, Children] = {}
        self.namespaces: dict[bytes, NamespaceState] = {}
        self.listeners: list[ChangeListener] = []
        self.encoded = 0
        self._pending_children: dict[ChunkKey, int] = {}

    def namespace(self, digest: bytes, chunk_size: int, world_size: int) -> NamespaceState | None:
        """The namespace, if it has chunks here. Raises ValueError when the shape differs."""
        namespace = self.namespaces.get(digest)
        if namespace and (namespace.chunk_size, namespace.world_size) != (chunk_size, world_size):
            raise ValueError(
                f"namespace {digest.hex()[:16]} has chunk_size {namespace.chunk_size} and "
                f"world_size {namespace.world_size} here; this request says {chunk_size} and "
                f"{world_size}"
            )
        return namespace

    def namespace_of(self, info: NamespaceInfo) -> NamespaceState:
        """The namespace that ``info`` describes, whether it has chunks here or not, with the forms
        that were not known. Raises ValueError when the shape differs."""
        namespace = self.namespace(info.digest, info.chunk_size, info.world_size)
        namespace = namespace or NamespaceState(info.digest, info.chunk_size, info.world_size)
        for rank, rank_layout in info.rank_layouts:
            namespace.rank_layouts.setdefault(rank, rank_layout)
        return namespace

    def records(self) -> list[StoredChunk]:
        """All complete chunks."""
        return [entry.record for entry in self.entries.values() if entry.complete]

    def walk(
        self, namespace: NamespaceState, tokens: bytes, start: int = 0, parent: ChunkKey = b""
    ) -> list[tuple[Located, Entry]]:
        """The longest stored prefix of packed ``tokens``, chunk by chunk from the first, or from
        the token ``start`` on, which follows the chunk ``parent``.

        Compares tokens, not keys, so the chunk after the last full match counts for as many of
        its first tokens as agree.
        """
        sort_key = big_endian(tokens)
        step = namespace.chunk_size * TOKEN_BYTES
        parent = parent or namespace.root
        found: list[tuple[Located, Entry]] = []
        for at in range(start * TOKEN_BYTES, len(sort_key), step):
            children = self.children.get(parent)
            if children is None:
                break
            entry, usable = children.longest(sort_key[at : at + step])
            if not usable or entry.namespace is not namespace:
                break
            located = Located(
                entry.key, at // TOKEN_BYTES, usable, entry.tokens, entry.payload.extents
            )
            found.append((located, entry))
            if usable < namespace.chunk_size:
                break
            parent = entry.key
        return found

    def select(self, digests: Iterable[bytes] | None, tokens: bytes | None) -> list[PartialChunk]:
        """The longest stored prefix of packed ``tokens`` in each of these namespaces, or in all
        (None); without tokens, all complete chunks there."""
        namespaces = self._named(digests)
        if tokens is not None:
            walks = [self.walk(namespace, tokens) for namespace in namespaces]
            return [
                PartialChunk(entry, located.usable) for walk in walks for located, entry in walk
            ]
        return [
            PartialChunk(entry, entry.tokens)
            for entry in self.entries.values()
            if entry.complete and entry.namespace in namespaces
        ]

    def holding(self, digests: Iterable[bytes] | None, tokens: bytes) -> list[Entry]:
        """Complete chunks, also behind holes, that hold only KV of packed ``tokens`` or that of
        the last of them and then more; not those that go on otherwise."""
        found: list[Entry] = []
        for namespace in self._named(digests):
            for link in chain(namespace.digest, tokens, namespace.chunk_size):
                sort_key = big_endian(tokens[link.start * TOKEN_BYTES : link.end * TOKEN_BYTES])
                found += [
                    entry
                    for entry in self.children.get(link.parent, ())
                    if entry.namespace is namespace
                    and (sort_key.startswith(entry.sort_key) or entry.sort_key.startswith(sort_key))
                ]
        return found

    def put(self, entry: Entry) -> None:
        """A chunk begins to be stored."""
        self.entries[entry.key] = entry
        self.pending[entry.key] = entry
        self._pending_children[entry.parent] = self._pending_children.get(entry.parent, 0) + 1
        self.namespaces.setdefault(entry.namespace.digest, entry.namespace).entries += 1
        self.encoded += entry.payload.encoding is not None

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
        entry.namespace.entries -= 1
        if not entry.namespace.entries:
            del self.namespaces[entry.namespace.digest]
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
        self.detach(entry)

    def attach_payload(self, entry: Entry, payload: Payload) -> None:
        """From now on the entry, whose last payload was detached, consists of this one."""
        payload.attached = True
        entry.payload = payload
        self.encoded += payload.encoding is not None

    def detach(self, entry: Entry) -> None:
        """The entry's payload goes when nobody uses it any more."""
        entry.payload.attached = False
        self.encoded -= entry.payload.encoding is not None

    def followers(self, key: ChunkKey) -> int:
        """How many chunks, pending ones too, have this one as their parent."""
        children = self.children.get(key)
        stored = len(children) if children else 0
        return stored + self._pending_children.get(key, 0)

    def _named(self, digests: Iterable[bytes] | None) -> list[NamespaceState]:
        if digests is None:
            return list(self.namespaces.values())
        return [self.namespaces[digest] for digest in digests if digest in self.namespaces]

    def _no_longer_pending(self, entry: Entry) -> None:
        del self.pending[entry.key]
        left = self._pending_children[entry.parent] - 1
        if left:
            self._pending_children[entry.parent] = left
        else:
            del self._pending_children[entry.parent]


class MemoryIndex(ChunkIndex):
    """An index that frees the memory of what leaves it."""

    def __init__(self, memory: MemoryBackend, policy: EvictionPolicy) -> None:
        super().__init__(policy)
        self.memory = memory
        self.capacity_bytes = memory.usage().capacity_bytes
        self._at: dict[int, Entry] = {}

    def put(self, entry: Entry) -> None:
        super().put(entry)
        self._own(entry)

    def attach_payload(self, entry: Entry, payload: Payload) -> None:
        super().attach_payload(entry, payload)
        self._own(entry)

    def detach(self, entry: Entry) -> None:
        super().detach(entry)
        for region in entry.payload.regions:
            self._at.pop(region.offset, None)
        self.release_if_unused(entry.payload)

    def replace_region(self, entry: Entry, rank: int, region: Region) -> None:
        """A rank needs another size than was set aside for it."""
        self.free(entry.payload.regions[rank])
        entry.payload.regions[rank] = region
        self._own(entry)

    def release_if_unused(self, payload: Payload) -> None:
        """Free the memory of a payload that is neither kept nor in use."""
        if not payload.attached and not payload.ref_count:
            for region in payload.regions:
                self.free(region)
            payload.regions = []

    def free(self, region: Region) -> None:
        self._at.pop(region.offset, None)
        self.memory.free(region)

    def owner_of(self, region: Region) -> Entry | None:
        """The linked entry whose memory this is. None for memory that is just being handed out,
        or of payloads that are used only until their readers are done."""
        return self._at.get(region.offset)

    def _own(self, entry: Entry) -> None:
        for region in entry.payload.regions:
            self._at[region.offset] = entry
