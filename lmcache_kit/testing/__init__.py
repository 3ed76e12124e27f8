"""Conformance suites for plugins: inherit one, define its fixture, run pytest.

1. A suite tests the contract in :mod:`lmcache_kit.interfaces`, through its public methods only.
2. A requirement that a plugin does not meet is declared by an attribute, or overridden with a
   reason (:func:`overrides`). No test of a suite disappears silently.
3. Each suite is proven by faulty plugins: every fault must fail a test.
4. Every wait has a limit, so that a plugin that hangs fails.

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
