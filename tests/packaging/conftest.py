"""All distributions, built once, and clean environments with some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.packaging.distributions import Built, build
from tests.packaging.environments import Environment

Make = Callable[..., Environment]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """By name."""
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def environment(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a clean environment with the distributions of these names."""

    def make(*names: str, extras: Iterable[str] = (), without: str = "") -> Environment:
        made = Environment.make(tmp_path_factory.mktemp("clean") / "env")
        made.install(*(built[name] for name in names), extras=extras, without=without)
        return made

    return make
