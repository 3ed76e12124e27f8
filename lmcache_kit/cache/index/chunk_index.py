"""The chunk index: the chunks of one tier, and which follows which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from lmcache_kit.cache.descriptors import NamespaceInfo
from lmcache_kit.cache.index.entries import (
    Children,
    Entry,
    NamespaceState,
    PartialChunk,
    Payload,
    big_endian,
)
from lmcache_kit.cache.records import ChangeListener, Located, StoredChunk
from lmcache_kit.interfaces import EvictionPolicy
from lmcache_kit.keys import TOKEN_BYTES, ChunkKey, chain

Walk: TypeAlias = "list[tuple[Located, Entry]]"
"""Chunks that match a prompt one after the other, from the first one on."""


class ChunkIndex:
    """Entries by key and by parent, in step with the policy and the listeners.

    An entry is *linked* from :meth:`put` to :meth:`unlink`. Listeners and policy know it from
    :meth:`complete` on. ``encoded`` counts the entries with an encoded payload. Called under the
    tier's lock; ``notify`` wakes threads that wait for a change.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.entries: dict[ChunkKey, Entry] = {}
        self.pending: dict[ChunkKey, Entry] = {}
        self.children: dict[ChunkKey, Children] = {}
        self.namespaces: dict[bytes, NamespaceState] = {}
        self.listeners: list[ChangeListener] = []
        self.encoded = 0
        self.notify: Callable[[], None] = lambda: None
        self._pending_children: dict[ChunkKey, int] = {}

    def namespace(self, digest: bytes, chunk_size: int, world_size: int) -> NamespaceState | None:
        """Return the namespace if it has chunks here. Raises ValueError for another shape."""
        namespace = self.namespaces.get(digest)
        if namespace and (namespace.chunk_size, namespace.world_size) != (chunk_size, world_size):
            raise ValueError(
                f"namespace {digest.hex()[:16]} has chunk_size {namespace.chunk_size} and "
                f"world_size {namespace.world_size} here; this request says {chunk_size} and "
                f"{world_size}"
            )
        return namespace

    def namespace_of(self, info: NamespaceInfo) -> NamespaceState:
        """Return the namespace that ``info`` describes, made if it has no chunks here.

        Adds the rank layouts that were not known. Raises ValueError for another shape.
        """
        namespace = self.namespace(info.digest, info.chunk_size, info.world_size)
        namespace = namespace or NamespaceState(info.digest, info.chunk_size, info.world_size)
        for rank, rank_layout in info.rank_layouts:
            namespace.rank_layouts.setdefault(rank, rank_layout)
        return namespace

    def records(self) -> list[StoredChunk]:
        """Return all complete chunks."""
        return [entry.record for entry in self.entries.values() if entry.complete]

    def walk(
        self, namespace: NamespaceState, tokens: bytes, start: int = 0, parent: ChunkKey = b""
    ) -> Walk:
        """Return the longest stored prefix of packed ``tokens``, chunk by chunk.

        With ``start``, the prefix begins at that token, which follows the chunk ``parent``. Tokens
        are compared, not keys: of the chunk after the last full match, the first tokens that agree
        count.
        """
        sort_key = big_endian(tokens)
        step = namespace.chunk_size * TOKEN_BYTES
        parent = parent or namespace.root
        found: Walk = []
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
        """Return the longest stored prefix of packed ``tokens`` in each of the namespaces.

        Without ``digests`` in all namespaces; without ``tokens`` all complete chunks there.
        """
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

    def covered_by(self, digests: Iterable[bytes] | None, tokens: bytes) -> list[Entry]:
        """Return the complete chunks that a clear of packed ``tokens`` means, also behind gaps.

        A chunk is meant if it has only these tokens, or the last of these and then others.
        """
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

    def followers_of(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the chunks that follow any of these, at whatever distance; pending ones too.

        Chunks that are among ``entries`` are left out.
        """
        pending: dict[ChunkKey, list[Entry]] = {}
        for entry in self.pending.values():
            pending.setdefault(entry.parent, []).append(entry)
        todo = list(entries)
        known = {entry.key for entry in todo}
        found: list[Entry] = []
        while todo:
            parent = todo.pop().key
            for entry in (*self.children.get(parent, ()), *pending.get(parent, ())):
                if entry.key not in known:
                    known.add(entry.key)
                    found.append(entry)
                    todo.append(entry)
        return found

    def put(self, entry: Entry) -> None:
        """Link a pending entry."""
        self.entries[entry.key] = entry
        self.pending[entry.key] = entry
        self._pending_children[entry.parent] = self._pending_children.get(entry.parent, 0) + 1
        self.namespaces.setdefault(entry.namespace.digest, entry.namespace).entries += 1
        self.encoded += entry.payload.encoding is not None

    def complete(self, entry: Entry) -> None:
        """Make an entry findable whose payload is complete."""
        self._no_longer_pending(entry)
        self.children.setdefault(entry.parent, Children()).add(entry)
        self.policy.added(entry.key)
        for listener in self.listeners:
            listener.added(entry.record)
        self.notify()

    def unlink(self, entry: Entry) -> None:
        """Make an entry unfindable, and detach its payload. Safe to call twice."""
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
        self.notify()

    def attach_payload(self, entry: Entry, payload: Payload) -> None:
        """Attach a new payload to an entry whose old one was detached."""
        payload.attached = True
        entry.payload = payload
        self.encoded += payload.encoding is not None

    def detach(self, entry: Entry) -> None:
        """Detach the payload of an entry, to be freed with its last hold."""
        entry.payload.attached = False
        self.encoded -= entry.payload.encoding is not None

    def release_if_unused(self, payload: Payload) -> None:
        """Free what a payload occupies if no entry consists of it and nothing uses it."""

    def touch(self, found: Walk) -> None:
        """Tell the policy of the chunks of a match, so that a tail leaves before its head."""
        for located, _ in reversed(found):
            self.policy.touched(located.key)

    def followers(self, key: ChunkKey) -> int:
        """Return how many chunks, pending ones too, have this one as their parent."""
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
