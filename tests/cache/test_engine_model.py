"""The engine against a model that is too simple to be wrong: it keeps every chunk as a tuple of
tokens in a list, and answers each question by looking at all of them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
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

from lmcache_kit.cache.builtin import make_eviction_policy
from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.records import StoredChunk, StoreItem
from lmcache_kit.interfaces import MemoryBackend, Region
from lmcache_kit.keys import chain, pack_tokens

CHUNK = 4
TTL = 100.0
OWNERS = ("ann", "bob", "cleo")
WORLDS = {b"A" * 32: 1, b"B" * 32: 2, b"C" * 32: 3}

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)
namespaces = st.sampled_from(sorted(WORLDS))
owners = st.sampled_from(OWNERS)


@dataclass(eq=False)
class Chunk:
    key: bytes
    parent: bytes
    space: bytes
    tokens: tuple[int, ...]
    sizes: list[int]
    offsets: dict[int, int] = field(default_factory=dict)
    committed: dict[int, int] = field(default_factory=dict)
    writers: set[int] = field(default_factory=set)
    leases: int = 0
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
        return bool(self.leases or self.writers)

    @property
    def held(self) -> bool:
        return self.linked or self.in_use


@dataclass
class Lease:
    owner: str
    ranks: set[int]
    chunks: list[Chunk]
    expires: float


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
        self.patterns = 0

    @initialize(units=st.integers(5, 24))
    def start(self, units: int) -> None:
        self.capacity = units * self.unit
        self.memory = type(self).make_memory(self.capacity)
        policy = make_eviction_policy(self.policy)
        assert policy is not None
        self.engine = CacheEngine(
            self.memory, policy, location="x", lease_ttl_s=TTL, clock=lambda: self.now
        )
        self.listener = Listener()
        assert self.engine.subscribe(self.listener) == []

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

    def may_leave(self, keep: set[bytes]) -> list[Chunk]:
        return [chunk for chunk in self.stored() if not chunk.in_use and chunk.key not in keep]

    def next_victim(self, keep: set[bytes]) -> Chunk:
        parents = {chunk.parent for chunk in self.chunks if chunk.linked}
        last = [chunk for chunk in self.may_leave(keep) if chunk.key not in parents]
        return min(last, key=RANKING[self.policy])

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.unit) * self.unit

    def room_could_be_made(self, nbytes: int, keep: set[bytes]) -> bool | None:
        """Would there be a large enough hole if all that may leave had left? None while memory
        is set aside for a rank that has not asked for it: clients do not see where that is."""
        leaving = self.may_leave(keep)
        if any(len(chunk.offsets) < chunk.world for chunk in self.chunks if chunk.held):
            return None
        run = 0
        taken = bytearray(self.capacity // self.unit)
        for chunk in self.chunks:
            if chunk.held and chunk not in leaving:
                for rank, offset in chunk.offsets.items():
                    size = self.rounded(chunk.sizes[rank]) // self.unit
                    taken[offset // self.unit : offset // self.unit + size] = b"\1" * size
        for unit in taken:
            run = 0 if unit else run + 1
            if run * self.unit >= self.rounded(nbytes):
                return True
        return False

    def write(self, chunk: Chunk, rank: int) -> None:
        self.patterns = self.patterns % 250 + 1
        chunk.committed[rank] = self.patterns
        region = Region(chunk.offsets[rank], chunk.sizes[rank])
        self.memory.view(region)[:] = bytes([self.patterns]) * chunk.sizes[rank]

    def end_lease(self, number: int) -> None:
        for chunk in self.leases.pop(number).chunks:
            chunk.leases -= 1

    def expire_leases(self) -> int:
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
        weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
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
        rank %= WORLDS[space]
        packed = pack_tokens(tokens)
        links = list(chain(space, packed, CHUNK))
        links = links[min(skip, len(links) - 1) :]
        items = [
            StoreItem(
                link.parent, packed[link.start * 4 : link.end * 4], weight * self.unit - 1 or 1
            )
            for link, weight in zip(links, weights, strict=False)
        ]
        self.expire_leases()
        before = self.engine.stats()
        evicted_before = len(self.listener.gone)
        keep = {link.key for link in links} | {item.parent for item in items}
        could = self.room_could_be_made(items[0].nbytes, keep)

        grants = self.engine.allocate(space, rank, WORLDS[space], CHUNK, items, owner)

        after = self.engine.stats()
        in_order = after["evicted_for_space_total"] == before["evicted_for_space_total"]
        evicted = self.listener.gone[evicted_before:]
        assert after["evicted_chunks_total"] - before["evicted_chunks_total"] == len(evicted)
        for key in evicted:
            chunk = self.linked(key)
            assert chunk is not None
            assert chunk in self.may_leave(keep), "what is in use or just granted never leaves"
            assert not in_order or chunk is self.next_victim(keep)
            chunk.linked = False

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
                    tuple(tokens[link.start : link.end]),
                    [item.nbytes] * WORLDS[space],
                )
                self.chunks.append(there)
            there.sizes[rank] = item.nbytes
            there.writers.add(rank)
            there.since = self.now
            self.check_free(there, rank, grant.offset)
            there.offsets[rank] = grant.offset
            self.tickets[grant.ticket] = (there, rank, owner)

        if len(grants) == 1 and grants[0].status == "refused":
            assert not evicted or WORLDS[space] > 1, "nothing is lost for a refusal"
            if WORLDS[space] == 1 and could is not None:
                assert not could or self.rounded(items[0].nbytes) > self.capacity

    def check_free(self, chunk: Chunk, rank: int, offset: int) -> None:
        end = offset + self.rounded(chunk.sizes[rank])
        assert 0 <= offset < end <= self.capacity
        for other in self.chunks:
            for index, at in other.offsets.items():
                if other.held and not (other is chunk and index == rank):
                    clear = end <= at or at + other.sizes[index] <= offset
                    assert clear, "memory of a chunk that is held is not handed out"

    @rule(space=namespaces, tokens=prompts, owner=owners, weight=st.integers(1, 4))
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
            counted = 0
            for ticket in mine:
                chunk, rank, _ = self.tickets.pop(ticket)
                chunk.writers.discard(rank)
                if chunk.linked:
                    counted += 1
                    self.write(chunk, rank)
                    chunk.since = self.now
                    if chunk.complete:
                        chunk.entered = chunk.used = self.tick()
            written = [(ticket, ticket) for ticket in left]  # those of others do not count
            assert self.engine.commit(written, owner) == counted

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), owner=owners)
    def abandon(self, data: st.DataObject, owner: str) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tickets)), min_size=1, unique=True))
        mine = [ticket for ticket in chosen if self.tickets[ticket][2] == owner]
        for ticket in mine:
            self.give_up(ticket)
        assert self.engine.abandon(chosen, owner) == len(mine)

    @rule(space=namespaces, tokens=prompts, owner=owners)
    def lookup(self, space: bytes, tokens: list[int], owner: str) -> None:
        match = self.engine.lookup(space, pack_tokens(tokens), CHUNK, WORLDS[space], owner)
        parent, at, found = space[:16], 0, []
        for located in match.chunks:
            assert located.start == at
            wanted = tuple(tokens[at : at + CHUNK])
            best = self.best(space, parent, wanted)
            chunk = self.linked(located.key)
            assert chunk is not None
            assert chunk in self.stored()
            assert chunk.parent == parent
            assert located.usable == best == common(chunk.tokens, wanted)
            assert located.tokens == len(chunk.tokens)
            assert [extent.nbytes for extent in located.extents] == chunk.sizes
            assert [extent.offset for extent in located.extents] == [
                chunk.offsets[rank] for rank in range(chunk.world)
            ]
            found.append(chunk)
            parent, at = located.key, located.end
        if at % CHUNK == 0 and at < len(tokens):
            assert self.best(space, parent, tuple(tokens[at : at + CHUNK])) == 0
        assert bool(match.lease) == bool(found)
        for chunk in reversed(found):
            chunk.leases += 1
            chunk.uses += 1
            chunk.used = self.tick()
        if found:
            assert match.lease not in self.leases
            self.leases[match.lease] = Lease(
                owner, set(range(WORLDS[space])), found, self.now + TTL
            )

    @rule(space=namespaces, tokens=prompts, owner=owners)
    def use(self, space: bytes, tokens: list[int], owner: str) -> None:
        before = set(self.leases)
        self.lookup(space, tokens, owner)
        for number in set(self.leases) - before:
            assert self.engine.release(number, None)
            self.end_lease(number)

    def best(self, space: bytes, parent: bytes, wanted: tuple[int, ...]) -> int:
        children = [c for c in self.stored() if c.space == space and c.parent == parent]
        return max((common(chunk.tokens, wanted) for chunk in children), default=0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), rank=st.none() | st.integers(0, 3))
    def release(self, data: st.DataObject, rank: int | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
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
        assert self.engine.expire() == self.expire_leases()
        for chunk in self.chunks:
            waiting = chunk.linked and not chunk.complete and not chunk.writers
            if waiting and chunk.since <= self.now - TTL:
                chunk.linked = False

    @rule(really=st.integers(0, 5))
    def clear(self, really: int) -> None:
        if not really:
            assert self.engine.clear()[0].chunks == len(self.stored())
            for chunk in self.chunks:
                chunk.linked = False

    # What always holds.

    @invariant()
    def accounting_is_exact(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.chunks = [chunk for chunk in self.chunks if chunk.held]
        usage = self.memory.usage()
        assert usage.requested_bytes == sum(sum(chunk.sizes) for chunk in self.chunks)
        assert usage.allocated_bytes == sum(
            self.rounded(size) for chunk in self.chunks for size in chunk.sizes
        )
        assert usage.allocated_bytes <= usage.capacity_bytes == self.capacity
        stats = self.engine.stats()
        assert stats["chunks"] == len(self.stored())
        assert stats["pending"] == sum(
            1 for chunk in self.chunks if chunk.linked and not chunk.complete
        )
        assert stats["leases"] == len(self.leases)
        assert stats["writers"] == len(self.tickets)
        assert stats["requested_bytes"] == usage.requested_bytes

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
        self.engine.snapshot(seen.extend)
        assert {chunk.key: chunk for chunk in seen} == expected

    @invariant()
    def bytes_of_held_chunks_stay(self) -> None:
        for chunk in self.chunks:
            for rank, pattern in chunk.committed.items():
                if chunk.held:
                    region = Region(chunk.offsets[rank], chunk.sizes[rank])
                    assert set(self.memory.view(region)) == {pattern}


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
