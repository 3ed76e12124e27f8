"""Everything at once, from several threads: what is read is what was written, and in the end
nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.interfaces import MemoryBackend, Region
from lmcache_kit.keys import chain, pack_tokens
from lmcache_kit.layout import KVLayout
from tests.cache.codecs import Zip

NAMESPACE = bytes(range(32))
CHUNK = 4
RANK_LAYOUT = RankLayout(KVLayout("float8_e4m3", 32, 1, 1, "mla"))
THREADS = 4
OPERATIONS = 2500


class Stress:
    def __init__(self, memory: MemoryBackend) -> None:
        self.memory = memory
        self.codec = Zip()
        self.loaders = ThreadPoolExecutor(2)
        self.engine = CacheEngine(memory, LRU(), location="x", loaders=self.loaders)
        self.failures: list[BaseException] = []
        self.read = 0

    def run(self, seed: int, ready: Barrier) -> None:
        choose = random.Random(seed)
        steps: list[Callable[[random.Random, str], None]] = [
            self.store, self.store, self.look_up, self.look_up, self.transcode, self.transcode,
            self.pin, self.clear,
        ]  # fmt: skip
        ready.wait()
        try:
            for _ in range(OPERATIONS):
                choose.choice(steps)(choose, f"owner {seed}")
        except BaseException as error:
            self.failures.append(error)
            raise

    @staticmethod
    def prompt(choose: random.Random) -> bytes:
        return pack_tokens([choose.randrange(2) for _ in range(choose.randint(1, 14))])

    def store(self, choose: random.Random, owner: str) -> None:
        tokens = self.prompt(choose)
        items = [
            StoreItem(
                link.parent,
                tokens[link.start * 4 : link.end * 4],
                32 * (link.end - link.start),
                link.start,
            )
            for link in chain(NAMESPACE, tokens, CHUNK)
        ]
        grants = self.engine.allocate(NAMESPACE, 0, 1, CHUNK, items, owner, RANK_LAYOUT)
        written = []
        for link, item, grant in zip(chain(NAMESPACE, tokens, CHUNK), items, grants, strict=True):
            if grant.status == "granted":
                data = link.key[:1] * item.nbytes
                self.memory.view(Region(grant.offset, item.nbytes))[:] = data
                written.append((grant.ticket, xxh3_64_intdigest(data)))
        if choose.random() < 0.1:
            self.engine.abandon([ticket for ticket, _ in written], owner)
        else:
            self.engine.commit(written, owner)

    def look_up(self, choose: random.Random, owner: str) -> None:
        wait_s = choose.choice([0.0, 20.0])
        match = self.engine.lookup(NAMESPACE, self.prompt(choose), CHUNK, 1, owner, wait_s)
        for chunk in match.chunks:
            [extent] = chunk.extents
            data = bytes(self.memory.view(Region(extent.offset, extent.nbytes)))
            assert data == chunk.key[:1] * extent.nbytes
            self.read += 1
        if choose.random() < 0.02:
            self.engine.drop_owner(owner)
        else:
            self.engine.release(match.lease, None)

    def transcode(self, choose: random.Random, _: str) -> None:
        keys = self.engine.memory_tier.keys(None, self.prompt(choose))
        for key, _tokens in keys:
            if choose.random() < 0.7:
                self.engine.memory_tier.encode(key, "zip", self.codec)
            else:
                self.engine.memory_tier.decode(key, "zip")

    def pin(self, choose: random.Random, owner: str) -> None:
        if choose.random() < 0.5:
            self.engine.memory_tier.pin(
                None, self.prompt(choose), owner, ttl_s=choose.choice([None, 0.01])
            )
        else:
            self.engine.memory_tier.unpin(None, None, owner)
        assert self.engine.stats()["pinned_bytes"] <= self.engine.memory_tier.pin_budget_bytes

    def clear(self, choose: random.Random, _: str) -> None:
        if choose.random() < 0.2:
            self.engine.memory_tier.clear(None, self.prompt(choose), force=choose.random() < 0.3)
        elif choose.random() < 0.05:
            self.engine.memory_tier.clear(force=choose.random() < 0.3)


def test_ten_thousand_operations_from_several_threads_leave_nothing_behind() -> None:
    backend = pytest.importorskip("lmcache_kit_cpu_backend.backend")
    stress = Stress(backend.LocalCPUBackend(24 * 4096))
    ready = Barrier(THREADS)
    threads = [Thread(target=stress.run, args=(seed, ready)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stress.failures == []
    stats = stress.engine.stats()
    assert stats["corrupt_total"] == 0
    for name in ("evicted_chunks_total", "encoded_chunks_total", "decoded_chunks_total"):
        assert stats[name] > 100, name
    assert stress.read > 1000
    for seed in range(THREADS):
        stress.engine.drop_owner(f"owner {seed}")
    stress.engine.memory_tier.unpin(None, None)
    stress.loaders.shutdown()
    stress.engine.memory_tier.clear(force=True)
    assert stress.memory.usage().allocated_bytes == 0
    stress.engine.close()
