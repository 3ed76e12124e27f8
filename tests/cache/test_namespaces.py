"""Which namespaces are registered, and what a new one of the same model replaces."""

from __future__ import annotations

import logging

import msgspec
import pytest

from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.keys import Namespace
from lmcache_kit.layout import KVLayout

LAYOUT = KVLayout("float16", 2, 1, 64)
ONE = Namespace("m", LAYOUT, 16, weights="w1", config="c1")
OTHER = msgspec.structs.replace(ONE, weights="w2")


@pytest.fixture
def registry() -> NamespaceRegistry:
    registry = NamespaceRegistry()
    assert registry.register(ONE) == []
    return registry


def test_a_namespace_replaces_another_one_of_its_model_and_the_log_says_why(
    registry: NamespaceRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    assert registry.register(OTHER) == [ONE]
    assert "KV that is cached of model 'm' is not used any more: weights was w1 and is w2" in (
        caplog.text
    )
    assert registry.bases == (ONE, OTHER)


def test_what_another_engine_uses_is_not_replaced(
    registry: NamespaceRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    assert registry.register(OTHER, {ONE}) == []
    assert caplog.text == ""


@pytest.mark.parametrize("change", [{"model": "alias"}, {"model": "n", "weights": "w3"}], ids=str)
def test_another_name_replaces_nothing(registry: NamespaceRegistry, change: dict[str, str]) -> None:
    assert registry.register(msgspec.structs.replace(ONE, **change)) == []


def test_a_new_generation_is_no_warning(
    registry: NamespaceRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert registry.register(msgspec.structs.replace(ONE, generation="g")) == [ONE]
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_names_do_not_count_where_weights_are_known() -> None:
    alias = msgspec.structs.replace(ONE, model="alias")
    assert alias.digest == ONE.digest
    assert list(alias.differences(ONE)) == []
    unknown = msgspec.structs.replace(ONE, weights="")
    named = msgspec.structs.replace(unknown, model="alias")
    assert named.digest != unknown.digest
    assert list(named.differences(unknown)) == [("model", "alias", "m")]
