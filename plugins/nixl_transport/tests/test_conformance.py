"""The transport and its plugin keep the kit's contracts."""

from __future__ import annotations

import pytest
from lmcache_kit_nixl_transport.transport import NixlTransport

from lmcache_kit.testing import PluginSuite, TransportSuite


class TestNixlTransport(TransportSuite):
    one_sided = True
    hides_memory = False

    @pytest.fixture
    def make_transport(self):
        return lambda memory: NixlTransport(memory, "127.0.0.1")


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-nixl-transport"
