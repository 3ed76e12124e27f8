"""The README of each plugin is its page on an index."""

from __future__ import annotations

import re
from pkgutil import resolve_name

import pytest

from lmcache_kit.plugins import Plugins
from lmcache_kit.specs import KINDS
from tests.packaging.distributions import EXAMPLE, PLUGINS, SOURCES

OURS = [name for name in PLUGINS if name != EXAMPLE]


def readme(name: str) -> str:
    return (SOURCES[name].folder / "README.md").read_text()


def ticked(name: str) -> set[str]:
    """Words that stand in backticks there."""
    return set(re.findall(r"`(\w+)`", readme(name)))


@pytest.mark.parametrize("name", PLUGINS)
def test_it_begins_with_the_distributions_name(name: str) -> None:
    assert readme(name).splitlines()[0] == f"# {name}"


@pytest.mark.parametrize("name", OURS)
def test_it_says_how_to_install_it(name: str) -> None:
    command = rf"^(\$ )?pip install .*\b{name}\b"
    assert re.search(command, readme(name), flags=re.MULTILINE)


@pytest.mark.parametrize("name", OURS)
def test_it_names_what_the_plugin_offers_and_every_option_of_that(name: str) -> None:
    plugins = Plugins.load(environ={})
    offers = [
        offer
        for kind in KINDS
        for offer in plugins.specs(kind)
        if offer.plugin.distribution == name
    ]
    assert offers, f"{name} is not installed: make setup"
    for _, spec, _ in offers:
        options = resolve_name(spec.config).model_fields if spec.config else ()
        assert {spec.name, *options} <= ticked(name)


def test_the_examples_readme_names_its_options() -> None:
    assert {"SQLiteBackend", "path", "max_size_gib"} <= ticked(EXAMPLE)
