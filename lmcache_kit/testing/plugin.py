"""The suite of installed plugins: entry points, declarations, options and probes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import importlib_metadata
import pytest

from lmcache_kit.errors import PluginBroken
from lmcache_kit.hookspecs import ENTRY_POINT_GROUP
from lmcache_kit.interfaces import Backend, Codec, Frontend, MemoryBackend, Transport
from lmcache_kit.plugins import Offer, Plugins
from lmcache_kit.specs import KINDS
from lmcache_kit.testing.suite import Suite

HEAVY = (
    "aiohttp", "cupy", "jax", "nixl", "numba", "numpy", "pandas", "pydantic", "pytest", "scipy",
    "tensorflow", "torch", "transformers", "triton", "vllm", "zmq", "zstandard",
)  # fmt: skip
"""Packages that an entry point's module must not import, since every process imports it."""

_CONTRACTS = {"codec": Codec, "transport": Transport, "frontend": Frontend}
_PARTS = ("make_eviction_policy", "cache_opened", "cache_closing", "report_header")
_LOADED_BY = """
import json, sys
before = set(sys.modules)
import importlib
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for hook in [each for each in vars(module) if each.startswith("register_")]:
        list(getattr(module, hook)())
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
_PROBE = """
import importlib, sys
module, _, attribute = sys.argv[1].partition(":")
answer = getattr(importlib.import_module(module), attribute)()
print(type(answer).__name__)
"""


class PluginSuite(Suite):
    """Conformance of an installed plugin. Set ``distribution`` to its name on the package index.

    The plugin must be installed; ``pip install -e .`` will do. ``probe_s`` limits the time of a
    probe in a new process, imports included.
    """

    distribution: ClassVar[str] = ""
    probe_s: ClassVar[float] = 5.0

    @pytest.fixture
    def installed(self) -> Any:
        if not self.distribution:
            self.missing("the attribute 'distribution'", 'distribution = "acme-pigeon"')
        try:
            return importlib_metadata.distribution(self.distribution)
        except importlib_metadata.PackageNotFoundError:
            pytest.fail(f"{self.distribution} is not installed: pip install -e .", pytrace=False)

    @pytest.fixture
    def modules(self, installed: Any) -> list[str]:
        """Modules that its entry points name."""
        groups: dict[str, list[str]] = {}
        for each in installed.entry_points:
            groups.setdefault(each.group, []).append(each.module)
        if ENTRY_POINT_GROUP not in groups:
            pytest.fail(
                f"{self.distribution} has no entry point in the group {ENTRY_POINT_GROUP!r}; it "
                f"has some in: {', '.join(sorted(groups)) or 'none'}"
            )
        return groups[ENTRY_POINT_GROUP]

    @pytest.fixture
    def plugins(self, modules: list[str]) -> Plugins:
        return Plugins.load(environ={})

    @pytest.fixture
    def offers(self, plugins: Plugins) -> list[Offer]:
        return list(self._own(offer for kind in KINDS for offer in plugins.specs(kind)))

    def test_it_loads_without_a_failure(self, plugins: Plugins) -> None:
        failures = [str(each) for each in plugins.failures if self._is(each.distribution)]
        assert failures == []
        assert any(self._is(info.distribution) for info in plugins.loaded)

    def test_it_offers_something_or_takes_part_in_something(
        self, plugins: Plugins, offers: list[Offer], modules: list[str]
    ) -> None:
        takes_part = any(hook in vars(sys.modules[name]) for name in modules for hook in _PARTS)
        assert offers or takes_part, f"{modules} implement no hook: is @hookimpl above them?"

    def test_its_module_is_light(self, modules: list[str]) -> None:
        loaded = json.loads(self._run(_LOADED_BY, *modules))
        heavy = sorted(set(HEAVY) & set(loaded))
        assert heavy == [], f"{modules} import {', '.join(heavy)}: move that to where it is used"

    def test_it_says_the_same_again(self, offers: list[Offer]) -> None:
        again = Plugins.load(environ={})
        found = list(self._own(offer for kind in KINDS for offer in again.specs(kind)))
        assert found == offers

    def test_names_are_plain_and_its_own(self, offers: list[Offer], plugins: Plugins) -> None:
        for kind, spec, _ in offers:
            assert re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", spec.name), f"{kind} {spec.name!r}"
            same = [each for each in plugins.specs(kind) if each.spec.name == spec.name]
            assert len(same) == 1, f"{kind} {spec.name!r} is offered {len(same)} times"

    def test_summaries_are_one_line(self, offers: list[Offer]) -> None:
        for _, spec, _ in offers:
            assert spec.summary.strip() == spec.summary != "", f"{spec.name!r} has no summary"
            assert len(spec.summary.splitlines()) == 1
            assert len(spec.summary) <= 100, f"{spec.name!r}: a long summary"

    def test_capabilities_are_names(self, offers: list[Offer]) -> None:
        for _, spec, _ in offers:
            assert isinstance(spec.capabilities, frozenset), f"{spec.name!r}: no frozenset"
            assert all(isinstance(each, str) and each for each in spec.capabilities)

    def test_targets_are_what_they_are_offered_as(
        self, offers: list[Offer], plugins: Plugins
    ) -> None:
        for offer in offers:
            if reason := plugins.why_unusable(offer):
                pytest.skip(f"{offer.spec.name!r} cannot be used here: {reason}")
            try:
                target = plugins.resolve(offer.kind, offer.spec.name)
            except PluginBroken as error:
                pytest.fail(str(error), pytrace=False)
            contract = _contract(offer)
            if contract and isinstance(target, type):
                assert issubclass(target, contract), f"{target} is no {contract.__name__}"
                missing = sorted(getattr(target, "__abstractmethods__", ()))
                assert missing == [], f"{target.__name__} lacks {', '.join(missing)}"
            assert callable(target), f"{offer.spec.target} cannot be called"

    def test_options_are_pydantic_models_with_defaults(self, offers: list[Offer]) -> None:
        """The kit builds options from the configuration, which may have none."""
        for _, spec, _ in offers:
            if spec.config:
                from pydantic import BaseModel

                model = resolve_name(spec.config)
                assert isinstance(model, type), f"{spec.config} is no class"
                assert issubclass(model, BaseModel), f"{spec.config} is no pydantic model"
                model()
                assert model.model_config.get("extra") == "forbid", (
                    f'{spec.config}: without extra="forbid" a misspelt option goes unnoticed'
                )

    def test_probes_tell_quickly(self, offers: list[Offer]) -> None:
        for _, spec, _ in offers:
            if spec.probe:
                answer = resolve_name(spec.probe)()
                assert isinstance(answer, str), f"{spec.probe} returns {answer!r}, not a string"
                begun = time.monotonic()
                assert self._run(_PROBE, spec.probe).strip() == "str"
                took = time.monotonic() - begun
                assert took < self.probe_s, f"{spec.probe} took {took:.1f} s in a new process"

    def test_it_is_typed(self, modules: list[str]) -> None:
        for package in {name.partition(".")[0] for name in modules}:
            spec = find_spec(package)
            assert spec, f"{package} cannot be imported"
            assert spec.submodule_search_locations, (
                f"{package} is a single module; only a package can carry py.typed"
            )
            found = [Path(each, "py.typed").exists() for each in spec.submodule_search_locations]
            assert any(found), f"{package} has no py.typed: type checkers ignore its annotations"

    def test_it_says_what_it_needs(self, installed: Any) -> None:
        needs = [re.split(r"[^\w.-]", each)[0] for each in installed.requires or []]
        assert "lmcache-kit" in map(_plain, needs), (
            f"{self.distribution} does not depend on lmcache-kit; it needs {needs}"
        )

    # Helpers.

    def _is(self, distribution: str) -> bool:
        return _plain(distribution) == _plain(self.distribution)

    def _own(self, offers: Iterable[Offer]) -> Iterable[Offer]:
        return (offer for offer in offers if self._is(offer.plugin.distribution))

    def _run(self, program: str, *arguments: str) -> str:
        """Run the program in a new interpreter with the same path; return its output."""
        code = f"import sys; sys.path[:] = {sys.path!r}\n{program}"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _contract(offer: Offer) -> type | None:
    if offer.kind == "backend":
        return MemoryBackend if "memory" in offer.spec.capabilities else Backend
    return _CONTRACTS.get(offer.kind)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
