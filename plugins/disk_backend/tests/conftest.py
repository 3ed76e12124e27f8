"""A store in a folder of the test's own, opened again as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions

GIB = 1 << 30
NOT_BLOBS = {"lock", "owner.json"}


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., LocalDiskBackend]]:
    opened: list[LocalDiskBackend] = []

    def open_it(capacity_bytes: int = 64 << 20, **options: Any) -> LocalDiskBackend:
        options = {"path": tmp_path / "store", **options}
        opened.append(LocalDiskBackend(DiskOptions(max_size_gib=capacity_bytes / GIB, **options)))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., LocalDiskBackend]) -> LocalDiskBackend:
    return open_store()


@pytest.fixture
def files(tmp_path: Path) -> Callable[[], list[Path]]:
    """All files of blobs in the store's folder."""

    def find() -> list[Path]:
        found = (tmp_path / "store").rglob("*")
        return sorted(path for path in found if not path.is_dir() and path.name not in NOT_BLOBS)

    return find
