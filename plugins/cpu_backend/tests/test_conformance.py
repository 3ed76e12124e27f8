"""The backend and its plugin keep the kit's contracts."""

from __future__ import annotations

import pytest
from lmcache_kit_cpu_backend.backend import LocalCPUBackend

from lmcache_kit.testing import MemoryBackendSuite, PluginSuite


class TestLocalCPUBackend(MemoryBackendSuite):
    @pytest.fixture
    def make_memory(self):
        return LocalCPUBackend


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-cpu-backend"
