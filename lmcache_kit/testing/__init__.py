"""Conformance suites: inherit one, name your plugin, run pytest.

Needs the extra ``lmcache-kit[testing]``; see docs/testing.md.
"""

from lmcache_kit.testing.backend import BackendSuite
from lmcache_kit.testing.codec import CodecSuite
from lmcache_kit.testing.controller import FakeController
from lmcache_kit.testing.frontend import FrontendSuite, Refused
from lmcache_kit.testing.hosts import Host, Wire
from lmcache_kit.testing.memory import MemoryBackendSuite
from lmcache_kit.testing.payloads import kv_like, random_bits, values_of
from lmcache_kit.testing.plugin import PluginSuite
from lmcache_kit.testing.suite import overrides
from lmcache_kit.testing.transport import TransportSuite

__all__ = [
    "BackendSuite",
    "CodecSuite",
    "FakeController",
    "FrontendSuite",
    "Host",
    "MemoryBackendSuite",
    "PluginSuite",
    "Refused",
    "TransportSuite",
    "Wire",
    "kv_like",
    "overrides",
    "random_bits",
    "values_of",
]
