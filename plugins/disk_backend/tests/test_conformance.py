"""The backend and its plugin keep the kit's contracts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions

from lmcache_kit.testing import BackendSuite, PluginSuite

CAPACITY_BYTES = 32 << 20


class TestLocalDiskBackend(BackendSuite):
    persists = True
    bounded_bytes = CAPACITY_BYTES

    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> Callable[[], LocalDiskBackend]:
        options = DiskOptions(path=tmp_path, max_size_gib=CAPACITY_BYTES / (1 << 30))
        return lambda: LocalDiskBackend(options)

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Callable[[bytes], None]:
        def cut(key: bytes) -> None:
            [file] = tmp_path.rglob(key.hex())
            os.truncate(file, file.stat().st_size - 1)

        return cut


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-disk-backend"
