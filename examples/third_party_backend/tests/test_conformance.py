"""The kit's conformance suites for this backend and this plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from acme_sqlite.backend import SQLiteBackend
from acme_sqlite.options import SQLiteOptions

from lmcache_kit.testing import BackendSuite, PluginSuite

MAX_SIZE_GIB = 1 / 32


class TestBackend(BackendSuite):
    persists = True
    bounded_bytes = int(MAX_SIZE_GIB * (1 << 30))

    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> Callable[[], SQLiteBackend]:
        options = SQLiteOptions(path=tmp_path / "kv.sqlite", max_size_gib=MAX_SIZE_GIB)
        return lambda: SQLiteBackend(options)


class TestPlugin(PluginSuite):
    distribution = "acme-sqlite"
