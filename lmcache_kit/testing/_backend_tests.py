"""Fixtures and helpers that the parts of the backends' suite share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import ClassVar, TypeAlias

import pytest

from lmcache_kit.interfaces import Backend, Blob, OpenBlob, Readable
from lmcache_kit.testing._bytes import Bytes
from lmcache_kit.testing.suite import Suite

MakeBackend: TypeAlias = Callable[[], Backend]
Damage: TypeAlias = Callable[[bytes], None]


def key_of(number: int) -> bytes:
    """Return a key: 16 bytes, spread like the kit's own."""
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


def bytes_of(nbytes: int, seed: int = 0) -> Bytes:
    """Return random bytes, different for each seed."""
    return Bytes(random.Random(f"{nbytes} {seed}").randbytes(nbytes))


def put(backend: Backend, key: bytes, data: bytes, meta: bytes = b"meta") -> None:
    """Put a blob from one buffer; fail if the store refuses it."""
    assert backend.put(key, meta, [memoryview(data)]) is True, "put() refused the blob"


def plain(blob: Blob | OpenBlob | None) -> tuple[Bytes, Bytes] | None:
    """Return meta and data of a blob as bytes, or None."""
    if isinstance(blob, OpenBlob):
        return Bytes(blob.meta), read_all(blob.file)
    return None if blob is None else (Bytes(blob.meta), Bytes(blob.data))


def read_all(file: Readable) -> Bytes:
    """Read the rest of the file as the kit does, and close it."""
    data, part = bytearray(), memoryview(bytearray(1 << 19))
    with closing(file):
        while count := file.readinto(part):
            assert 0 < count <= len(part), f"readinto() of {len(part)} bytes returned {count}"
            data += part[:count]
    return Bytes(data)


class BackendTests(Suite):
    """Base of the parts of :class:`~lmcache_kit.testing.BackendSuite`."""

    persists: ClassVar[bool] = False
    bounded_bytes: ClassVar[int | None] = None

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        self.missing(
            "the fixture 'make_backend'",
            """
            @pytest.fixture
            def make_backend(self, tmp_path):
                return lambda: MyBackend(Options(path=tmp_path))
            """,
        )

    @pytest.fixture
    def damage(self) -> Damage | None:
        """Return a function that damages the blob of a key, if the backend detects damage."""
        return None

    @pytest.fixture
    def opened(self, make_backend: MakeBackend) -> Iterator[MakeBackend]:
        """Return a function that opens the store of this test; close all backends at the end."""
        made: list[Backend] = []

        def build() -> Backend:
            made.append(make_backend())
            return made[-1]

        yield build
        for backend in made:
            self.within(backend.close, what="close()")

    @pytest.fixture
    def backend(self, opened: MakeBackend) -> Backend:
        return opened()

    def needs_persistence(self) -> None:
        if not self.persists:
            pytest.skip("persists = False: blobs end with the backend")

    def needs_bound(self) -> int:
        if self.bounded_bytes is None:
            pytest.skip("bounded_bytes = None: make_backend sets no limit")
        return self.bounded_bytes

    def is_empty(self, backend: Backend, keys: Sequence[bytes]) -> None:
        """Assert by every method that none of the keys has a blob."""
        assert [plain(backend.get(key)) for key in keys] == [None] * len(keys)
        assert backend.contains(keys) == [False] * len(keys)
        assert {stored.key for stored in backend.scan()}.isdisjoint(keys)
