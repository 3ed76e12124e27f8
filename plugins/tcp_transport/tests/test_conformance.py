"""The transport and its plugin keep the kit's contracts."""

from __future__ import annotations

import pytest
from lmcache_kit_tcp_transport.transport import TcpTransport

from lmcache_kit.testing import PluginSuite, TransportSuite


class TestTcpTransport(TransportSuite):
    @pytest.fixture
    def make_transport(self):
        return lambda memory: TcpTransport(memory, "127.0.0.1")


class TestPlugin(PluginSuite):
    distribution = "lmcache-kit-tcp-transport"
