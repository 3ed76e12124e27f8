"""How vLLM finds the connector."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

from lmcache_kit.vllm import plugin
from tests.support.processes import run_python


@pytest.fixture
def factory() -> Iterator[Any]:
    """vLLM's factory, as it is before any plugin was loaded, and put back afterwards."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    before = dict(KVConnectorFactory._registry)
    for name in (plugin.NAME, plugin.LMCACHE_NAME):
        KVConnectorFactory._registry.pop(name, None)
    KVConnectorFactory.register_connector(
        plugin.LMCACHE_NAME, "collections", "OrderedDict"
    )  # stands for vLLM's own
    yield KVConnectorFactory
    KVConnectorFactory._registry.clear()
    KVConnectorFactory._registry.update(before)


def served(factory: Any, name: str) -> str:
    return str(factory.get_connector_class_by_name(name).__module__)


def pretend_lmcache_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: object())


def test_vllm_loads_the_entry_point() -> None:
    (found,) = metadata.entry_points(group="vllm.general_plugins", name="lmcache_kit")
    assert found.load() is plugin.register


def test_both_names_are_served_when_lmcache_is_absent(factory: Any) -> None:
    plugin.register()
    assert served(factory, plugin.NAME) == "lmcache_kit.vllm.connector"
    assert served(factory, plugin.LMCACHE_NAME) == "lmcache_kit.vllm.connector"


def test_registering_twice_changes_nothing(factory: Any, caplog: pytest.LogCaptureFixture) -> None:
    plugin.register()
    plugin.register()
    assert served(factory, plugin.LMCACHE_NAME) == "lmcache_kit.vllm.connector"
    assert not caplog.records


def test_lmcache_keeps_its_name_when_it_is_installed(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_lmcache_is_installed(monkeypatch)
    plugin.register()
    assert served(factory, plugin.NAME) == "lmcache_kit.vllm.connector"
    assert served(factory, plugin.LMCACHE_NAME) == "collections"


def test_lmcache_s_name_can_be_taken_over(factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_lmcache_is_installed(monkeypatch)
    monkeypatch.setenv(plugin.TAKE_OVER, "1")
    plugin.register()
    assert served(factory, plugin.LMCACHE_NAME) == "lmcache_kit.vllm.connector"


def test_vllm_still_keeps_connectors_in_the_private_registry_that_we_change() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert isinstance(KVConnectorFactory._registry, dict)
    assert plugin.LMCACHE_NAME in KVConnectorFactory._registry


def test_a_failure_is_logged_and_never_raised(
    factory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(factory, "_registry")
    plugin.register()
    assert "could not register its connector" in caplog.text
    monkeypatch.undo()


@pytest.mark.parametrize("name", [plugin.NAME, plugin.LMCACHE_NAME])
def test_the_module_path_finds_both_names(name: str) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    found = KVConnectorFactory.get_connector_class(
        KVTransferConfig(
            kv_connector=name, kv_role="kv_both", kv_connector_module_path="lmcache_kit.vllm"
        )
    )
    assert (found.__module__, found.__name__) == ("lmcache_kit.vllm.connector", name)


def test_an_unknown_name_in_the_package_is_an_attribute_error() -> None:
    import lmcache_kit.vllm

    with pytest.raises(AttributeError, match="no attribute 'NoSuchConnector'"):
        _ = lmcache_kit.vllm.NoSuchConnector


def test_the_entry_point_s_module_is_light() -> None:
    heavy = "{'torch', 'vllm', 'numba', 'numpy', 'pydantic'}"
    code = f"import sys, lmcache_kit.vllm.plugin; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"
