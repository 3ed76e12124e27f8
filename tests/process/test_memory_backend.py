"""A memory backend of a third party: named in the configuration, opened with its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import ConfigError, PluginBroken, PluginNotFound
from lmcache_kit.keys import pack_tokens
from lmcache_kit.plugins import Plugins
from lmcache_kit.service.build import memory_factory

if TYPE_CHECKING:
    from tests.process.conftest import Configure, Connect
    from tests.support.sites import FakeSite

NAMESPACE = bytes(32)
TOKENS = pack_tokens(range(12))

DECLARATION = """
@hookimpl
def register_backends():
    return [
        BackendSpec(
            "AcmeMemory", "acme_arena:AcmeMemory", "memory of one run after the other",
            config="acme_arena:Options", capabilities=frozenset({"memory"}),
        ),
        BackendSpec("AcmeStore", "acme_arena:AcmeMemory", "claims to be no memory"),
        BackendSpec("AcmeNothing", "acme_arena:nothing", "", capabilities=frozenset({"memory"})),
    ]
"""

ARENA = '''
import mmap, os
from pydantic import BaseModel
from lmcache_kit.interfaces import MemoryBackend, Region, Usage


class Options(BaseModel, extra="forbid"):
    align: int = 1


def nothing(capacity_bytes):
    return capacity_bytes


class AcmeMemory(MemoryBackend):
    """Gives out the first hole that is large enough."""

    def __init__(self, capacity_bytes, options=Options()):
        self.align, self.capacity, self.taken = options.align, capacity_bytes, []
        self._fd = os.memfd_create("acme")
        os.ftruncate(self._fd, capacity_bytes)
        self._memory = memoryview(mmap.mmap(self._fd, capacity_bytes))

    @property
    def fd(self):
        return self._fd

    @property
    def memory(self):
        return self._memory

    def holes(self):
        at = 0
        for region in sorted(self.taken):
            yield at, region.offset - at
            at = -(-(region.offset + region.nbytes) // self.align) * self.align
        yield at, self.capacity - at

    def allocate(self, nbytes):
        for offset, room in self.holes():
            if room >= nbytes:
                self.taken.append(Region(offset, nbytes))
                return self.taken[-1]
        return None

    def free(self, region):
        self.taken.remove(region)

    def eviction_plan(self, nbytes, evictable):
        return [each for each in self.taken if evictable(each)] or None

    def view(self, region):
        return self._memory[region.offset : region.offset + region.nbytes]

    def usage(self):
        held = sum(each.nbytes for each in self.taken)
        largest = max(room for _, room in self.holes())
        return Usage(self.capacity, held, held, len(self.taken), max(0, largest))

    def close(self):
        pass
'''


@pytest.fixture
def acme(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> FakeSite:
    """Install the plugin where a spawned cache process finds it too."""
    site.install("acme-memory", DECLARATION)
    site.module("acme_arena", ARENA)
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{site.folder}{os.pathsep}{inherited}")
    return site


@pytest.mark.usefixtures("acme")
def test_a_cache_process_serves_from_the_memory_of_a_third_party(connect: Connect) -> None:
    options = {"AcmeMemory": {"align": 64}}
    client = connect(memory_backend="AcmeMemory", backend_options=options, local_cpu=False)
    grants = client.allocate(
        NAMESPACE,
        8,
        [StoreItem(NAMESPACE[:16], TOKENS[:32], 7), StoreItem(bytes(16), TOKENS[32:], 9)],
    )
    assert [grant.offset for grant in grants] == [0, 64]
    assert client.stats().location == "AcmeMemory"
    memory = client.memory(grants.incarnation)
    assert memory is not None
    memory[:7] = b"seven b"
    [grant, _] = grants
    assert client.commit([(grant.ticket, 0)]) == 1
    found = client.lookup(NAMESPACE, TOKENS, 8)
    assert found.tokens == 8
    [chunk] = found.chunks
    [extent] = chunk.extents
    assert bytes(memory[extent.offset : extent.offset + extent.nbytes]) == b"seven b"


@pytest.mark.usefixtures("acme")
def test_a_client_with_another_memory_backend_gets_a_new_process(connect: Connect) -> None:
    client = connect(cache_linger_s=30)
    before = client.incarnation
    client.close()
    again = connect(cache_linger_s=30, memory_backend="AcmeMemory")
    assert again.incarnation != before
    assert again.stats().location == "AcmeMemory"


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"memory_backend": "Box"},
            PluginNotFound,
            r"memory_backend: no backend 'Box'.*Installed: Acme.*, AcmeNothing, LocalCPUBackend$",
        ),
        ({"memory_backend": "AcmeStore"}, ConfigError, r"AcmeStore is no memory\. Installed: Acme"),
        (
            {
                "memory_backend": "AcmeMemory",
                "backend_options": {"AcmeMemory": {"algin": 1, "x": 2}},
            },
            ConfigError,
            r"backend_options: AcmeMemory\.algin: Extra inputs .*; AcmeMemory\.x: Extra inputs",
        ),
        (
            {"backend_options": {"LocalCPUBackend": {"a": 1}}},
            ConfigError,
            "backend 'LocalCPUBackend' takes no options",
        ),
    ],
)
@pytest.mark.usefixtures("acme")
def test_a_memory_that_cannot_be_is_refused(
    configure: Configure, keys: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        memory_factory(configure(**keys), Plugins.load())


def test_without_the_default_memory_an_unknown_one_says_how_to_install_it(
    configure: Configure,
) -> None:
    plugins = Plugins.load(environ={"LMCACHE_KIT_PLUGINS": "-cpu_backend"})
    with pytest.raises(PluginNotFound, match=r"Installed: none.*pip install lmcache-kit-cpu-back"):
        memory_factory(configure(memory_backend="Box"), plugins)


@pytest.mark.usefixtures("acme")
def test_a_target_that_is_no_memory_names_the_backend(connect: Connect) -> None:
    with pytest.raises(PluginBroken, match=r"'AcmeNothing' cannot be opened: .* is no MemoryBack"):
        connect(memory_backend="AcmeNothing")
