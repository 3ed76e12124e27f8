"""A cache with small memory over stores that keep everything finds all that was ever stored."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.errors import BackendError
from tests.cache.conftest import Clock, FakeMemory
from tests.cache.stores import Cache, Dict, SharedDict

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def common(a: list[int], b: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]),
                min(len(a), len(b)))  # fmt: skip


class Tiered(RuleBasedStateMachine):
    """Memory has room for the longest prompt and one chunk more. ``lost``: prompts of which a
    store, while it was down, may have missed something."""

    @initialize(stores=st.lists(st.sampled_from([Dict, SharedDict]), min_size=1, max_size=3))
    def begin(self, stores: list[type[Dict]]) -> None:
        self.clock = Clock()
        self.kinds = stores
        self.blobs: list[dict[bytes, tuple[bytes, bytes]]] = [{} for _ in stores]
        self.stored: list[list[int]] = []
        self.broken = False
        self.lossy = False
        self.open()

    def open(self) -> None:
        def make_engine(capacity_bytes: int) -> CacheEngine:
            return CacheEngine(FakeMemory(capacity_bytes), LRU(), location="Fake", clock=self.clock)

        made: list[Any] = [kind(blobs) for kind, blobs in zip(self.kinds, self.blobs, strict=True)]
        self.cache = Cache(make_engine, *made, memory=400, clock=self.clock)

    def shut(self) -> None:
        self.cache.close()
        self.cache.engine.close()

    @rule(tokens=PROMPTS)
    def store(self, tokens: list[int]) -> None:
        self.lossy |= self.broken
        self.cache.store(tokens)
        self.stored.append(tokens)

    @rule(tokens=PROMPTS)
    def look_up(self, tokens: list[int]) -> None:
        found = self.cache.hit(tokens)
        self.cache.settle()
        best = max((common(tokens, each) for each in self.stored), default=0)
        assert found <= best, "tokens that nobody stored"
        if not self.lossy and not self.broken:
            assert found == best

    @rule()
    def forget_memory(self) -> None:
        self.cache.forget_memory()

    @rule()
    def restart(self) -> None:
        self.shut()
        self.broken = False
        self.open()

    @precondition(lambda self: not self.broken)
    @rule()
    def break_down(self) -> None:
        self.broken = True
        for store in self.cache.stores:
            store.broken = BackendError("down")

    @precondition(lambda self: self.broken)
    @rule()
    def repair(self) -> None:
        self.broken = False
        self.clock.now += 60
        for store in self.cache.stores:
            store.broken = None
        self.cache.engine.expire()
        self.cache.settle()

    @invariant()
    def nothing_is_held_and_all_is_accounted_for(self) -> None:
        stats = self.cache.engine.stats()
        assert stats["leases"] == stats["pending"] == stats["writers"] == 0
        assert stats["requested_bytes"] == 100 * stats["chunks"]
        for tier in self.cache.tiers:
            assert tier.stats()["stored_bytes"] == 100 * tier.stats()["chunks"]

    @invariant()
    def an_index_says_what_lies_in_its_store(self) -> None:
        for tier, blobs, kind in zip(self.cache.tiers, self.blobs, self.kinds, strict=True):
            known = {holding.key for holding in tier.chunk_refs(None, None)}
            assert known <= blobs.keys()
            if kind is Dict and not self.broken:
                assert known == blobs.keys()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.shut()


TestTiered = Tiered.TestCase
TestTiered.settings = settings(
    max_examples=int(os.environ.get("TIERED_EXAMPLES", "30")), stateful_step_count=25, deadline=None
)
