"""The store against a dict, with restarts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions

from lmcache_kit.interfaces import StoreUsage
from plugins.disk_backend.tests.blobs import plain

BLOCK = 4096
CAPACITY = 12 * BLOCK
keys = st.binary(min_size=1, max_size=1).map(lambda byte: bytes([byte[0] % 5]) * 16)
sizes = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 20 * BLOCK])


def room(meta: bytes, data: bytes) -> int:
    return (-(-(48 + len(meta)) // BLOCK) - (-len(data) // BLOCK)) * BLOCK


class StoreAgainstDict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.blobs: dict[bytes, tuple[bytes, bytes]] = {}
        self.store = self.open()

    def open(self) -> LocalDiskBackend:
        size = CAPACITY / (1 << 30)
        return LocalDiskBackend(DiskOptions(path=Path(self.folder), max_size_gib=size))

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @property
    def used(self) -> int:
        return sum(room(*blob) for blob in self.blobs.values())

    @rule(key=keys, meta=st.sampled_from([b"", b"meta", b"m" * 5000]), size=sizes, cuts=st.data())
    def put(self, key: bytes, meta: bytes, size: int, cuts: st.DataObject) -> None:
        data = key[:1] * size
        cut = cuts.draw(st.integers(0, size))
        fits = self.used + room(meta, data) <= CAPACITY
        assert self.store.put(key, meta, [memoryview(data[:cut]), memoryview(data[cut:])]) == fits
        if fits:
            self.blobs.pop(key, None)
            self.blobs[key] = (meta, data)

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        assert plain(self.store.get(key)) == self.blobs.get(key)

    @rule(some=st.lists(keys, max_size=4))
    def remove(self, some: list[bytes]) -> None:
        self.store.remove(some)
        for key in some:
            self.blobs.pop(key, None)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = self.open()

    @rule(some=st.lists(keys, max_size=4))
    def contains(self, some: list[bytes]) -> None:
        assert self.store.contains(some) == [key in self.blobs for key in some]

    @rule()
    def scan(self) -> None:
        assert list(self.store.scan()) == [
            (key, meta, len(data)) for key, (meta, data) in self.blobs.items()
        ]

    @invariant()
    def accounts_agree(self) -> None:
        assert self.store.usage() == StoreUsage(len(self.blobs), self.used, CAPACITY)


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
