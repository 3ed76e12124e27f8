"""The backend and its plugin keep the kit's contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from lmcache_kit_valkey_backend.backend import ValkeyBackend

from lmcache_kit.testing import BackendSuite, PluginSuite

if TYPE_CHECKING:
    from plugins.valkey_backend.tests.conftest import Served


class TestValkeyBackend(BackendSuite):
    persists = True  # as long as the server lives

    @pytest.fixture
    def make_backend(self, server: Served) -> Callable[[], ValkeyBackend]:
        return lambda: ValkeyBackend(server.options())


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-valkey-backend"
