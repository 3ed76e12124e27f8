"""The engine against a model that is too simple to be wrong: it keeps every chunk as a tuple of
tokens in a list, and answers each question by looking at all of them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.builtin_policies import make_eviction_policy
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.lookup import PendingLookup
from lmcache_kit.cache.records import Selected, StoredChunk, StoreItem
from lmcache_kit.interfaces import BlobInfo, ChunkInfo, Codec, MemoryBackend, Region
from lmcache_kit.interfaces.codec import Buffer
from lmcache_kit.keys import chain, pack_tokens
from lmcache_kit.layout import KVLayout

CHUNK = 4
TTL = 100.0
PINNED_SHARE = 0.5
OWNERS = ("ann", "bob", "cleo")
WORLDS = {b"A" * 32: 1, b"B" * 32: 2, b"C" * 32: 3}

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)
namespaces = st.sampled_from(sorted(WORLDS))
owners = st.sampled_from(OWNERS)


@dataclass(eq=False)
class Body:
    """Memory of a chunk; offsets as far as they are known. ``source``: what it is decoded from."""

    sizes: list[int]
    offsets: dict[int, int] = field(default_factory=dict)
    packed: bool = False
    decoded: bool = True
    holds: int = 0
    source: Body | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


@dataclass(eq=False)
class Chunk:
    key: bytes
    parent: bytes
    space: bytes
    before: tuple[int, ...]
    tokens: tuple[int, ...]
    body: Body
    others: list[Body] = field(default_factory=list)
    committed: dict[int, int] = field(default_factory=dict)
    writers: set[int] = field(default_factory=set)
    linked: bool = True
    since: float = 0.0
    entered: int = 0
    used: int = 0
    uses: int = 1

    @property
    def world(self) -> int:
        return WORLDS[self.space]

    @property
    def complete(self) -> bool:
        return len(self.committed) == self.world

    @property
    def in_use(self) -> bool:
        return bool(self.body.holds or self.writers)

    @property
    def bodies(self) -> list[Body]:
        """Those that still have memory."""
        own = [self.body] if self.linked or self.in_use else []
        return own + [body for body in self.others if body.holds and body is not self.body]

    @property
    def copy(self) -> Body | None:
        """The raw copy that readers of a packed chunk have, or wait for."""
        found = [body for body in self.others if body.holds and body.source is self.body]
        return found[0] if found else None


@dataclass
class Lease:
    owner: str
    ranks: set[int]
    bodies: list[Body]
    expires: float


@dataclass
class Pinned:
    parts: list[tuple[Chunk, int]]
    expires: float | None


@dataclass
class Pending:
    """A lookup that waits for decoding."""

    search: PendingLookup
    tokens: list[int]
    parts: list[tuple[Chunk, Body]]


RANKING: dict[str, Callable[[Chunk], Any]] = {
    "LRU": lambda chunk: chunk.used,
    "FIFO": lambda chunk: chunk.entered,
    "LFU": lambda chunk: (chunk.uses, chunk.used),
}


class Listener:
    def __init__(self) -> None:
        self.known: dict[bytes, StoredChunk] = {}
        self.gone: list[bytes] = []

    def added(self, chunk: StoredChunk) -> None:
        assert chunk.key not in self.known
        self.known[chunk.key] = chunk

    def removed(self, key: bytes) -> None:
        del self.known[key]
        self.gone.append(key)


class Halver(Codec):
    """For payloads of one value: half of it."""

    format_version = 1

    def encode(self, payload: Buffer, chunk: ChunkInfo) -> bytes:
        assert len(payload) == chunk.payload_bytes
        assert len(set(payload)) == 1
        return bytes(payload[: len(payload) // 2 or 1])

    def decode(self, blob: Buffer, chunk: ChunkInfo, out: Buffer) -> None:
        assert len(out) == chunk.payload_bytes
        memoryview(out)[:] = bytes(blob[:1]) * len(out)

    def describe(self, blob: Buffer) -> BlobInfo:
        raise AssertionError("the engine does not ask")

    def max_blob_bytes(self, chunk: ChunkInfo) -> int:
        return chunk.payload_bytes


class ByHand(Executor):
    """Runs what was submitted, first come first served, when the machine says so."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], Any]] = []

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks.append(lambda: task(*args, **kwargs))
        return Future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.tasks.clear()


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class EngineAgainstModel(RuleBasedStateMachine):
    make_memory: Callable[[int], MemoryBackend]
    policy = "LRU"
    unit = 1

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ticks = 0
        self.chunks: list[Chunk] = []
        self.tickets: dict[int, tuple[Chunk, int, str]] = {}
        self.leases: dict[int, Lease] = {}
        self.pins: dict[str, Pinned] = {}
        self.pending: list[Pending] = []
        self.decodes: list[tuple[Chunk, Body, Body]] = []
        self.patterns = 0
        self.codec = Halver()
        self.loader = ByHand()

    @initialize(units=st.integers(5, 40))
    def start(self, units: int) -> None:
        self.capacity = units * self.unit
        self.budget = int(self.capacity * PINNED_SHARE)
        self.memory = type(self).make_memory(self.capacity)
        policy = make_eviction_policy(self.policy)
        assert policy is not None
        self.engine = CacheEngine(
            self.memory,
            policy,
            location="x",
            lease_ttl_s=TTL,
            max_pinned_share=PINNED_SHARE,
            loaders=self.loader,
            clock=lambda: self.now,
        )
        self.listener = Listener()
        assert self.engine.memory_tier.subscribe(self.listener) == []
        self.form = RankLayout(KVLayout("float8_e4m3", 1, 1, self.unit, "mla"))

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    # The model's own notions.

    def stored(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.linked and chunk.complete]

    def linked(self, key: bytes) -> Chunk | None:
        found = [chunk for chunk in self.chunks if chunk.linked and chunk.key == key]
        assert len(found) < 2
        return found[0] if found else None

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def pinned(self) -> list[Chunk]:
        parts = [part for pin in self.pins.values() for part in pin.parts]
        return [chunk for chunk in self.stored() if any(chunk is each for each, _ in parts)]

    def pinned_bytes(self) -> int:
        return sum(chunk.body.nbytes for chunk in self.pinned())

    def may_leave(self, keep: set[bytes]) -> list[Chunk]:
        pinned = self.pinned()
        return [
            chunk
            for chunk in self.stored()
            if not chunk.in_use and chunk.key not in keep and chunk not in pinned
        ]

    def next_victim(self, keep: set[bytes]) -> Chunk:
        parents = {chunk.parent for chunk in self.chunks if chunk.linked}
        last = [chunk for chunk in self.may_leave(keep) if chunk.key not in parents]
        return min(last, key=RANKING[self.policy])

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.unit) * self.unit

    def bodies(self) -> list[Body]:
        return [body for chunk in self.chunks for body in chunk.bodies]

    def room_could_be_made(self, nbytes: int, keep: set[bytes]) -> bool | None:
        """Would there be a large enough hole if all that may leave had left? None while there is
        memory of which clients do not see where it is."""
        leaving = {id(chunk.body) for chunk in self.may_leave(keep)}
        if any(len(body.offsets) < len(body.sizes) for body in self.bodies()):
            return None
        run = 0
        taken = bytearray(self.capacity // self.unit)
        for body in self.bodies():
            if id(body) not in leaving:
                for rank, offset in body.offsets.items():
                    size = self.rounded(body.sizes[rank]) // self.unit
                    taken[offset // self.unit : offset // self.unit + size] = b"\1" * size
        for unit in taken:
            run = 0 if unit else run + 1
            if run * self.unit >= self.rounded(nbytes):
                return True
        return False

    @contextmanager
    def evicting(self, keep: set[bytes], *, in_order: bool = True) -> Iterator[list[bytes]]:
        """Whatever is evicted inside may be, and goes in the policy's order."""
        before = self.engine.stats()
        evicted_before = len(self.listener.gone)
        evicted: list[bytes] = []
        yield evicted
        after = self.engine.stats()
        if after["evicted_for_space_total"] != before["evicted_for_space_total"]:
            in_order = False
        evicted += self.listener.gone[evicted_before:]
        assert after["evicted_chunks_total"] - before["evicted_chunks_total"] == len(evicted)
        for key in evicted:
            chunk = self.linked(key)
            assert chunk is not None
            assert chunk in self.may_leave(keep), "what is held or just granted never leaves"
            assert not in_order or chunk is self.next_victim(keep)
            chunk.linked = False

    def end_lease(self, number: int) -> None:
        for body in self.leases.pop(number).bodies:
            body.holds -= 1

    def expire_holds(self) -> int:
        for pin_id, pin in list(self.pins.items()):
            if pin.expires is not None and pin.expires <= self.now:
                del self.pins[pin_id]
        late = [number for number, lease in self.leases.items() if lease.expires <= self.now]
        for number in late:
            self.end_lease(number)
        return len(late)

    def give_up(self, ticket: int) -> None:
        chunk, rank, _ = self.tickets.pop(ticket)
        chunk.writers.discard(rank)
        chunk.linked = False

    # What clients do.

    @rule(
        space=namespaces,
        tokens=prompts,
        rank=st.integers(0, 2),
        owner=owners,
        weights=st.lists(st.integers(0, 9), min_size=4, max_size=4),
        skip=st.integers(0, 2),
    )
    def store(
        self,
        space: bytes,
        tokens: list[int],
        rank: int,
        owner: str,
        weights: list[int],
        skip: int,
    ) -> None:
        """A weight of 0 means the size that the layout says."""
        rank %= WORLDS[space]
        packed = pack_tokens(tokens)
        links = list(chain(space, packed, CHUNK))
        links = links[min(skip, len(links) - 1) :]
        items = [
            StoreItem(
                link.parent,
                packed[link.start * 4 : link.end * 4],
                (weight * self.unit - 1 or 1) if weight else (link.end - link.start) * self.unit,
                link.start,
            )
            for link, weight in zip(links, weights, strict=False)
        ]
        self.expire_holds()
        keep = {link.key for link in links} | {item.parent for item in items}
        could = self.room_could_be_made(items[0].nbytes, keep)
        with self.evicting(keep) as evicted:
            grants = self.engine.allocate(
                space, rank, WORLDS[space], CHUNK, items, owner, self.form
            )

        refused: set[bytes] = set()
        for link, item, grant in zip(links, items, grants, strict=False):
            there = self.linked(link.key)
            if there and (there.complete or rank in there.committed or rank in there.writers):
                assert grant.status == "present"
                continue
            assert grant.status != "present"
            if grant.status == "refused":
                refused.add(link.key)
                if there:
                    there.linked = False
                continue
            assert link.parent not in refused, "what could not be found is not stored"
            if there is None:
                there = Chunk(
                    link.key,
                    link.parent,
                    space,
                    tuple(tokens[: link.start]),
                    tuple(tokens[link.start : link.end]),
                    Body([item.nbytes] * WORLDS[space]),
                )
                self.chunks.append(there)
            there.body.sizes[rank] = item.nbytes
            there.writers.add(rank)
            there.since = self.now
            self.check_free(there.body, rank, grant.offset)
            there.body.offsets[rank] = grant.offset
            self.tickets[grant.ticket] = (there, rank, owner)

        if len(grants) == 1 and grants[0].status == "refused":
            assert not evicted or WORLDS[space] > 1, "nothing is lost for a refusal"
            if WORLDS[space] == 1 and could is not None:
                assert not could or self.rounded(items[0].nbytes) > self.capacity

    def check_free(self, body: Body, rank: int, offset: int) -> None:
        end = offset + self.rounded(body.sizes[rank])
        assert 0 <= offset < end <= self.capacity
        for other in self.bodies():
            for index, at in other.offsets.items():
                if not (other is body and index == rank):
                    clear = end <= at or at + other.sizes[index] <= offset
                    assert clear, "memory of a chunk that is held is not handed out"

    @rule(space=namespaces, tokens=prompts, owner=owners, weight=st.integers(0, 4))
    def store_for_all_ranks(self, space: bytes, tokens: list[int], owner: str, weight: int) -> None:
        for rank in range(WORLDS[space]):
            self.store(space, tokens, rank, owner, [weight] * 4, 0)
        self.commit_tickets([t for t, (_, _, whose) in self.tickets.items() if whose == owner])

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tickets)), min_size=1, unique=True))
        self.commit_tickets(chosen)

    def commit_tickets(self, chosen: list[int]) -> None:
        for owner in OWNERS:
            left = [ticket for ticket in chosen if ticket in self.tickets]
            mine = [ticket for ticket in left if self.tickets[ticket][2] == owner]
            written = dict.fromkeys(left, 0)  # those of others do not count
            counted = 0
            for ticket in mine:
                chunk, rank, _ = self.tickets.pop(ticket)
                chunk.writers.discard(rank)
                if chunk.linked:
                    counted += 1
                    written[ticket] = self.write(chunk, rank)
                    chunk.since = self.now
                    if chunk.complete:
                        chunk.entered = chunk.used = self.tick()
            assert self.engine.commit(list(written.items()), owner) == counted

    def write(self, chunk: Chunk, rank: int) -> int:
        """Returns the checksum of what was written."""
        self.patterns = self.patterns % 250 + 1
        chunk.committed[rank] = self.patterns
        data = bytes([self.patterns]) * chunk.body.sizes[rank]
        self.memory.view(Region(chunk.body.offsets[rank], chunk.body.sizes[rank]))[:] = data
        return xxh3_64_intdigest(data)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), owner=owners)
    def abandon(self, data: st.DataObject, owner: str) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tickets)), min_size=1, unique=True))
        mine = [ticket for ticket in chosen if self.tickets[ticket][2] == owner]
        for ticket in mine:
            self.give_up(ticket)
        assert self.engine.abandon(chosen, owner) == len(mine)

    @rule(space=namespaces, tokens=prompts, owner=owners, patience=st.integers(0, 3))
    def lookup(self, space: bytes, tokens: list[int], owner: str, patience: int) -> None:
        """0: wait for nothing; 1: be asked later; else: wait for all."""
        count = len(self.listener.gone)
        search = self.engine.begin_lookup(
            space, pack_tokens(tokens), CHUNK, WORLDS[space], owner, lambda: None
        )
        evicted = self.listener.gone[count:]
        parts = self.check_found(space, tokens, search)
        for key in evicted:
            chunk = self.linked(key)
            assert chunk in self.may_leave({located.key for located, _ in search.found})
            assert chunk is not None
            chunk.linked = False
        read: list[tuple[Chunk, Body]] = []
        for chunk in parts:
            body = chunk.body
            if body.packed and chunk.copy:
                body = chunk.copy
            elif body.packed:
                sizes = [len(chunk.tokens) * self.unit] * chunk.world
                body = Body(sizes, decoded=False, source=chunk.body)
                chunk.others.append(body)
                self.decodes.append((chunk, chunk.body, body))
                chunk.body.holds += 1
                body.holds += 1
            read.append((chunk, body))
        for chunk, body in reversed(read):
            body.holds += 1
            chunk.uses += 1
            chunk.used = self.tick()
        assert bool(search.lease) == bool(read)
        if read:
            assert search.lease not in self.leases
            ranks = set(range(WORLDS[space]))
            self.leases[search.lease] = Lease(
                owner, ranks, [body for _, body in read], self.now + TTL
            )
        assert search.undecoded == sum(not body.decoded for _, body in read)
        self.pending.append(Pending(search, tokens, read))
        if patience > 1:
            while search.waiting:
                self.decode_next()
        if patience != 1 or not search.waiting:
            self.finish(self.pending.pop())

    def check_found(self, space: bytes, tokens: list[int], search: PendingLookup) -> list[Chunk]:
        """The chunks found, of which none could be longer; the last may be cut off for room."""
        parent, at, found = space[:16], 0, list[Chunk]()
        for located, _ in search.found:
            assert located.start == at
            wanted = tuple(tokens[at : at + CHUNK])
            best = self.best(space, parent, wanted)
            chunk = self.linked(located.key)
            assert chunk is not None
            assert chunk in self.stored()
            assert chunk.parent == parent
            assert located.usable == best == common(chunk.tokens, wanted)
            assert located.tokens == len(chunk.tokens)
            found.append(chunk)
            parent, at = located.key, located.end
        if at % CHUNK == 0 and at < len(tokens):
            wanted = tuple(tokens[at : at + CHUNK])
            best = self.best(space, parent, wanted)
            next_ones = [c for c in self.stored() if c.parent == parent and c.space == space]
            cut_off = [c for c in next_ones if common(c.tokens, wanted) == best and c.body.packed]
            assert best == 0 or cut_off
        return found

    def finish(self, pending: Pending) -> None:
        search = pending.search
        match = self.engine.finish_lookup(search)
        if search.lease not in self.leases:
            assert match == (0, ())
            return
        ready = []
        for chunk, body in pending.parts:
            if not body.decoded:
                break
            ready.append((chunk, body))
        assert [located.key for located in match.chunks] == [chunk.key for chunk, _ in ready]
        for located, (_, body) in zip(match.chunks, ready, strict=True):
            assert [extent.nbytes for extent in located.extents] == body.sizes
            offsets = {rank: extent.offset for rank, extent in enumerate(located.extents)}
            assert body.offsets in ({}, offsets)
            if not body.offsets:
                for rank, offset in offsets.items():
                    self.check_free(body, rank, offset)
                body.offsets = offsets
        assert match.lease == (search.lease if ready else 0)
        lease = self.leases[search.lease]
        for body in lease.bodies[len(ready) :]:
            body.holds -= 1
        lease.bodies = lease.bodies[: len(ready)]
        if not ready:
            del self.leases[search.lease]

    @precondition(lambda self: self.stored())
    @rule(data=st.data(), owner=owners, patience=st.integers(0, 3))
    def lookup_what_is_stored(self, data: st.DataObject, owner: str, patience: int) -> None:
        chunk = data.draw(st.sampled_from(self.stored()))
        self.lookup(chunk.space, [*chunk.before, *chunk.tokens], owner, patience)

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def finish_one(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.pending) - 1))
        self.finish(self.pending.pop(number))

    @precondition(lambda self: self.decodes)
    @rule()
    def decode_next(self) -> None:
        """A loader's turn; it decodes only what a reader still wants."""
        chunk, packed, copy = self.decodes.pop(0)
        self.loader.tasks.pop(0)()
        packed.holds -= 1
        copy.holds -= 1
        copy.decoded = bool(copy.holds)
        assert chunk.body is packed or not chunk.linked or not chunk.body.packed

    @rule(space=namespaces, tokens=prompts, owner=owners)
    def use(self, space: bytes, tokens: list[int], owner: str) -> None:
        before = set(self.leases)
        self.lookup(space, tokens, owner, 2)
        for number in set(self.leases) - before:
            assert self.engine.release(number, None)
            self.end_lease(number)

    def best(self, space: bytes, parent: bytes, wanted: tuple[int, ...]) -> int:
        children = [c for c in self.stored() if c.space == space and c.parent == parent]
        return max((common(chunk.tokens, wanted) for chunk in children), default=0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), rank=st.none() | st.integers(0, 3))
    def release(self, data: st.DataObject, rank: int | None) -> None:
        waiting = {pending.search.lease for pending in self.pending}
        known = sorted(set(self.leases) - waiting)
        if not known:
            return
        number = data.draw(st.sampled_from(known))
        ranks = self.leases[number].ranks
        held = rank is None or rank in ranks
        assert self.engine.release(number, rank) is held
        ranks -= ranks if rank is None else {rank}
        if not ranks:
            self.end_lease(number)

    @rule(owner=owners, really=st.integers(0, 2))
    def owner_dies(self, owner: str, really: int) -> None:
        if really:
            return
        self.engine.drop_owner(owner)
        for number in [n for n, lease in self.leases.items() if lease.owner == owner]:
            self.end_lease(number)
        for ticket in [t for t, (_, _, whose) in self.tickets.items() if whose == owner]:
            self.give_up(ticket)

    @precondition(lambda self: self.stored())
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(self.stored()))
        assert self.engine.drop_corrupt(chunk.key)
        chunk.linked = False
        assert not self.engine.drop_corrupt(chunk.key)

    @rule(seconds=st.sampled_from([1.0, 40.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        assert self.engine.expire() == self.expire_holds()
        for chunk in self.chunks:
            waiting = chunk.linked and not chunk.complete and not chunk.writers
            if waiting and chunk.since <= self.now - TTL:
                chunk.linked = False

    # What operators do.

    @rule(
        space=namespaces,
        tokens=prompts,
        pin_id=st.sampled_from("pqr"),
        ttl_s=st.sampled_from([None, 50.0]),
    )
    def pin(self, space: bytes, tokens: list[int], pin_id: str, ttl_s: float | None) -> None:
        self.expire_holds()
        there, pinned = self.engine.memory_tier.pin(
            [space], pack_tokens(tokens), pin_id, ttl_s=ttl_s
        )
        self.pins.pop(pin_id, None)
        entries = self.engine.memory_tier.keys([space], pack_tokens(tokens))
        parts = []
        for key, count in entries:
            chunk = self.linked(key)
            assert chunk is not None
            parts.append((chunk, count))
        assert there == selected(parts)
        left = self.budget - self.pinned_bytes()
        kept: list[tuple[Chunk, int]] = []
        for chunk, count in parts:
            left -= 0 if chunk in self.pinned() else chunk.body.nbytes
            if left < 0:
                break
            kept.append((chunk, count))
        assert pinned == selected(kept)
        if kept:
            expires = None if ttl_s is None else self.now + ttl_s
            self.pins[pin_id] = Pinned(kept, expires)

    @rule(pin_id=st.sampled_from("pqr"))
    def unpin(self, pin_id: str) -> None:
        self.expire_holds()
        pin = self.pins.pop(pin_id, None)
        parts = [(c, count) for c, count in pin.parts if c.linked] if pin else []
        assert self.engine.memory_tier.unpin(None, None, pin_id) == selected(parts)

    @rule(space=namespaces, tokens=prompts)
    def unpin_tokens(self, space: bytes, tokens: list[int]) -> None:
        self.expire_holds()
        freed: dict[bytes, tuple[Chunk, int]] = {}
        for pin_id, pin in list(self.pins.items()):
            text = sum((chunk.tokens[:count] for chunk, count in pin.parts), ())
            if pin.parts[0][0].space == space and tuple(tokens[: len(text)]) == text:
                del self.pins[pin_id]
                for chunk, count in pin.parts:
                    if chunk.linked and freed.get(chunk.key, (chunk, 0))[1] < count:
                        freed[chunk.key] = (chunk, count)
        assert self.engine.memory_tier.unpin([space], pack_tokens(tokens)) == selected(
            list(freed.values())
        )

    @rule(really=st.integers(0, 5), force=st.booleans())
    def clear(self, really: int, force: bool) -> None:
        if not really:
            self.expire_holds()
            linked = [chunk for chunk in self.chunks if chunk.linked]
            kept = [] if force else [chunk for chunk in linked if self.leads_to_a_pin(chunk)]
            gone = [chunk for chunk in linked if chunk not in kept]
            complete = [[chunk for chunk in each if chunk.complete] for each in (gone, kept)]
            expected = (whole(complete[0]), whole(complete[1]))
            assert self.engine.memory_tier.clear(force=force) == expected
            for chunk in gone:
                chunk.linked = False

    def followers(self, chunks: list[Chunk]) -> list[Chunk]:
        """What follows these at any distance, being stored or not."""
        found: list[Chunk] = []
        parents = {chunk.key for chunk in chunks}
        while parents:
            more = [c for c in self.chunks if c.linked and c.parent in parents and c not in found]
            found += more
            parents = {chunk.key for chunk in more}
        return [chunk for chunk in found if chunk not in chunks]

    def leads_to_a_pin(self, chunk: Chunk) -> bool:
        return any(each in self.pinned() for each in [chunk, *self.followers([chunk])])

    @rule(space=namespaces, tokens=prompts, force=st.booleans())
    def clear_tokens(self, space: bytes, tokens: list[int], force: bool) -> None:
        self.expire_holds()
        wanted = tuple(tokens)
        meant = []
        for chunk in self.stored():
            text = chunk.before + chunk.tokens
            same = common(text, wanted)
            if (
                chunk.space == space
                and same > len(chunk.before)
                and (same == len(text) or same == len(wanted))
            ):
                meant.append(chunk)
        kept = [] if force else [chunk for chunk in meant if self.leads_to_a_pin(chunk)]
        gone = [chunk for chunk in meant if chunk not in kept]
        gone += self.followers(gone)
        expected = (whole([chunk for chunk in gone if chunk.complete]), whole(kept))
        assert self.engine.memory_tier.clear([space], pack_tokens(tokens), force=force) == expected
        for chunk in gone:
            chunk.linked = False

    @precondition(lambda self: self.stored())
    @rule(data=st.data())
    def compress(self, data: st.DataObject) -> None:
        self.compress_one(data.draw(st.sampled_from(self.stored())))

    @rule(space=namespaces, tokens=prompts, owner=owners)
    def store_compressed(self, space: bytes, tokens: list[int], owner: str) -> None:
        self.store_for_all_ranks(space, tokens, owner, 0)
        self.compress_all()

    @rule()
    def compress_all(self) -> None:
        for chunk in self.stored():
            if chunk.linked:
                self.compress_one(chunk)

    def compress_one(self, chunk: Chunk) -> None:
        raw = chunk.body
        size = len(chunk.tokens) * self.unit
        with self.evicting({chunk.key}) as evicted:
            result = self.engine.memory_tier.encode(chunk.key, "half", self.codec)
        if raw.packed:
            assert result.status == "already"
        elif raw.sizes != [size] * chunk.world:
            assert result.status == "failed"
            assert "tokens of its layout" in result.why
        elif size == 1:
            assert (result.status, result.why) == ("failed", "it would not get smaller")
        elif result.status == "failed":
            assert raw.holds, "the room of what nobody reads is enough"
            assert "no room" in result.why
        else:
            assert result.status == "done"
            assert raw.holds or not evicted
            chunk.body = Body([size // 2] * chunk.world, packed=True)
            chunk.others = [*(body for body in chunk.others if body is not raw), raw]
            assert (result.bytes_before, result.bytes_after) == (raw.nbytes, chunk.body.nbytes)

    @precondition(lambda self: self.stored())
    @rule(data=st.data())
    def decompress(self, data: st.DataObject) -> None:
        while self.decodes:
            self.decode_next()
        chunk = data.draw(st.sampled_from(self.stored()))
        packed, copy = chunk.body, chunk.copy
        with self.evicting({chunk.key}) as evicted:
            result = self.engine.memory_tier.decode(chunk.key, "half")
        if not packed.packed:
            assert result.status == "already"
            return
        raw = copy or Body([len(chunk.tokens) * self.unit] * chunk.world)
        growth = raw.nbytes - packed.nbytes
        fits = chunk not in self.pinned() or self.pinned_bytes() + growth <= self.budget
        if result.status == "failed":
            assert ("no room" if fits else "it is pinned") in result.why
            assert not (fits and copy)
            assert not evicted or chunk.world > 1, "nothing is lost for a refusal"
            return
        assert fits
        assert result == ("done", "", packed.nbytes, raw.nbytes)
        assert not (copy and evicted)
        chunk.body = raw

    # What always holds.

    @invariant()
    def accounting_is_exact(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.chunks = [chunk for chunk in self.chunks if chunk.linked or chunk.bodies]
        usage = self.memory.usage()
        sizes = [size for body in self.bodies() for size in body.sizes]
        assert usage.requested_bytes == sum(sizes)
        assert usage.allocated_bytes == sum(self.rounded(size) for size in sizes)
        assert usage.allocated_bytes <= usage.capacity_bytes == self.capacity
        stats = self.engine.stats()
        assert stats["chunks"] == len(self.stored())
        assert stats["pending"] == sum(
            1 for chunk in self.chunks if chunk.linked and not chunk.complete
        )
        assert stats["leases"] == len(self.leases)
        assert stats["writers"] == len(self.tickets)
        assert stats["requested_bytes"] == usage.requested_bytes
        assert stats["encoded_chunks"] == sum(chunk.body.packed for chunk in self.stored())
        assert stats["pins"] == len(self.pins)
        assert stats["pinned_bytes"] == self.pinned_bytes() <= self.budget
        assert len(self.loader.tasks) == len(self.decodes)

    @invariant()
    def listeners_know_what_is_stored(self) -> None:
        if not hasattr(self, "engine"):
            return
        expected = {
            chunk.key: StoredChunk(
                chunk.key, chunk.parent, len(chunk.tokens), len(chunk.tokens) < CHUNK
            )
            for chunk in self.stored()
        }
        assert self.listener.known == expected
        seen: list[StoredChunk] = []
        self.engine.memory_tier.snapshot(seen.extend)
        assert {chunk.key: chunk for chunk in seen} == expected

    @invariant()
    def bytes_of_held_chunks_stay(self) -> None:
        for chunk in self.chunks:
            for body in chunk.bodies:
                for rank, offset in body.offsets.items():
                    if rank in chunk.committed and body.decoded:
                        view = self.memory.view(Region(offset, body.sizes[rank]))
                        assert set(view) == {chunk.committed[rank]}


def selected(parts: list[tuple[Chunk, int]]) -> Selected:
    nbytes = sum(chunk.body.nbytes for chunk, _ in parts)
    return Selected(sum(count for _, count in parts), len(parts), nbytes)


def whole(chunks: list[Chunk]) -> Selected:
    return selected([(chunk, len(chunk.tokens)) for chunk in chunks])


def check(make_memory: Callable[[int], MemoryBackend], name: str, unit_bytes: int) -> None:
    class Machine(EngineAgainstModel):
        policy = name
        unit = unit_bytes

    Machine.make_memory = staticmethod(make_memory)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("policy", ["LRU", "FIFO", "LFU"])
def test_the_engine_does_what_the_model_does(
    policy: str, fake_memory: Callable[[int], MemoryBackend]
) -> None:
    check(fake_memory, policy, 1)


@pytest.mark.parametrize("policy", ["LRU", "FIFO", "LFU"])
def test_the_engine_does_what_the_model_does_over_shared_memory(policy: str) -> None:
    backend = pytest.importorskip("lmcache_kit_cpu_backend.backend")
    check(backend.LocalCPUBackend, policy, mmap.PAGESIZE)
