"""How vLLM finds the connector."""

from __future__ import annotations

import inspect
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
    found = KVConnectorFactory.get_connector_class
    KVConnectorFactory.get_connector_class = inspect.unwrap(found)
    KVConnectorFactory._registry.pop(plugin.NAME, None)
    for name in plugin.LMCACHE_NAMES:
        KVConnectorFactory._registry.pop(name, None)
        # Stands for vLLM's own, which need the package.
        KVConnectorFactory.register_connector(name, "collections", "OrderedDict")
    yield KVConnectorFactory
    KVConnectorFactory.get_connector_class = found
    KVConnectorFactory._registry.clear()
    KVConnectorFactory._registry.update(before)


def served(factory: Any, name: str) -> str:
    return str(factory.get_connector_class_by_name(name).__module__)


def pretend_lmcache_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: object())


def test_vllm_loads_the_entry_point() -> None:
    (found,) = metadata.entry_points(group="vllm.general_plugins", name="lmcache_kit")
    assert found.load() is plugin.register


@pytest.mark.parametrize("name", [plugin.NAME, *plugin.LMCACHE_NAMES])
def test_every_name_is_served_when_lmcache_is_absent(factory: Any, name: str) -> None:
    plugin.register()
    assert served(factory, name) == "lmcache_kit.vllm.connector"


def test_the_backend_that_vllms_option_names_is_served(factory: Any) -> None:
    from vllm.config import CacheConfig, VllmConfig

    config = VllmConfig.__new__(VllmConfig)
    config.cache_config = CacheConfig(kv_offloading_size=1.0, kv_offloading_backend="lmcache")
    config.kv_transfer_config = None
    config._post_init_kv_transfer_config()
    plugin.register()
    found = factory.get_connector_class(config.kv_transfer_config)
    assert found.__module__ == "lmcache_kit.vllm.connector"


def transfer(name: str, path: str) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path=path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("LMCacheConnectorV1Dynamic", "lmcache.integration.vllm.lmcache_connector_v1"),
        ("LMCacheConnectorV1Dynamic", "lmcache.integration.vllm.lmcache_connector_v1_085"),
        ("LMCacheMPConnector", "lmcache.integration.vllm.lmcache_mp_connector"),
    ],
)
def test_lmcache_s_modules_are_served_when_it_is_absent(
    factory: Any, name: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin._log_once.cache_clear()
    caplog.set_level("INFO", "vllm.lmcache_kit")
    plugin.register()
    find = factory.get_connector_class
    plugin.register()
    assert factory.get_connector_class is find
    for _ in range(2):
        found = factory.get_connector_class(transfer(name, path))
    assert found.__module__ == "lmcache_kit.vllm.connector"
    assert caplog.messages == [f"kv_connector {name} of {path} is LMCacheKitConnector"]


def test_another_class_of_lmcache_s_modules_is_told_what_to_write(factory: Any) -> None:
    plugin.register()
    with pytest.raises(ValueError, match=r"write kv_connector 'LMCacheKitConnector' and no kv_con"):
        factory.get_connector_class(transfer("LMCacheECConnector", "lmcache.integration.vllm.ec"))


def test_modules_of_others_are_vllms_affair(factory: Any) -> None:
    plugin.register()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        factory.get_connector_class(transfer("LMCacheConnectorV1Dynamic", "no_such_module"))


def test_lmcache_s_modules_are_its_own_when_it_is_installed(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.register()
    pretend_lmcache_is_installed(monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="lmcache"):
        factory.get_connector_class(
            transfer("LMCacheConnectorV1Dynamic", "lmcache.integration.vllm.lmcache_connector_v1")
        )


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
    assert {served(factory, name) for name in plugin.LMCACHE_NAMES} == {"collections"}


def test_lmcache_s_name_can_be_taken_over(factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_lmcache_is_installed(monkeypatch)
    monkeypatch.setenv(plugin.TAKE_OVER, '"1"')
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


@pytest.mark.parametrize("name", [plugin.NAME, *plugin.LMCACHE_NAMES])
def test_the_module_path_finds_every_name(factory: Any, name: str) -> None:
    found = factory.get_connector_class(transfer(name, "lmcache_kit.vllm"))
    assert found.__module__ == "lmcache_kit.vllm.connector"


def test_an_unknown_name_in_the_package_is_an_attribute_error() -> None:
    import lmcache_kit.vllm

    with pytest.raises(AttributeError, match="no attribute 'NoSuchConnector'"):
        _ = lmcache_kit.vllm.NoSuchConnector


def test_the_entry_point_s_module_is_light() -> None:
    heavy = "{'torch', 'vllm', 'numba', 'numpy', 'pydantic'}"
    code = f"import sys, lmcache_kit.vllm.plugin; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"
