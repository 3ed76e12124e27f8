"""The shortest calls of a backend, and what fixtures make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcache_kit_valkey_backend.backend import ValkeyBackend
from lmcache_kit_valkey_backend.options import ValkeyOptions

if TYPE_CHECKING:
    from plugins.valkey_backend.tests.conftest import Served

Open = Callable[[ValkeyOptions], ValkeyBackend]
Serve = Callable[..., "Served"]
Pretend = Callable[..., ValkeyOptions]
KEY, OTHER = bytes(16), bytes([1] * 16)


def put(backend: ValkeyBackend, key: bytes = KEY, data: bytes = b"data") -> bool:
    return backend.put(key, b"meta", [memoryview(data)])


def got(backend: ValkeyBackend, key: bytes = KEY) -> bytes | None:
    blob = backend.get(key)
    return None if blob is None else bytes(blob.data)
