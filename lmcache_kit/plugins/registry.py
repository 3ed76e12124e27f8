"""Look up by name what the installed plugins offer."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lmcache_kit.errors import (
    ConfigError,
    DuplicateName,
    KitError,
    PluginBroken,
    PluginNotFound,
)
from lmcache_kit.first_party import distribution_of
from lmcache_kit.interfaces import CacheInfo, EvictionPolicy
from lmcache_kit.plugins.discovery import SELECTION_VARIABLE, Discovery, discover
from lmcache_kit.plugins.records import Failure, Offer, PluginInfo, Raised, attempt
from lmcache_kit.specs import (
    KEY_TYPES,
    BackendSpec,
    CodecSpec,
    CommandSpec,
    ConfigKey,
    FrontendSpec,
    Kind,
    RouteSpec,
    Spec,
    TransportSpec,
)

logger = logging.getLogger(__name__)

BUILTIN_POLICIES = ("FIFO", "LFU", "LRU")
_VERSIONS = ("api version", "requirement")
"""Stages whose error includes the remedy: to install another version."""

_BUILTIN = "lmcache_kit.cache.index.builtin_policies"
_KEY = re.compile(r"[a-z][a-z0-9_]*")
_TARGET = re.compile(r"[\w.]+:[\w.]+")
_REGISTRATIONS: Mapping[str, tuple[Kind, type[Spec]]] = {
    "register_backends": ("backend", BackendSpec),
    "register_codecs": ("codec", CodecSpec),
    "register_transports": ("transport", TransportSpec),
    "register_frontends": ("frontend", FrontendSpec),
    "register_routes": ("route", RouteSpec),
    "register_commands": ("command", CommandSpec),
}


class Plugins:
    """All plugins that are installed and selected.

    ``loaded`` work, ``blocked`` are kept out by ``LMCACHE_KIT_PLUGINS``, ``failures`` say what
    does not work and why. ``log_failures``: log each once, as a warning.

    >>> plugins = Plugins.load(environ={"LMCACHE_KIT_PLUGINS": "disk_backend"})
    >>> [offer.plugin.distribution for offer in plugins.specs("backend")]
    ['lmcache-kit-disk-backend']
    """

    def __init__(self, discovery: Discovery, *, log_failures: bool = True) -> None:
        self._log_failures = log_failures
        self.loaded: list[PluginInfo] = discovery.loaded
        self.blocked: list[PluginInfo] = discovery.blocked
        self.failures: list[Failure] = []
        self._manager = discovery.manager
        self._infos = {info.name: info for info in discovery.loaded}
        self._offers: dict[tuple[Kind, str], list[Offer]] = defaultdict(list)
        for failure in discovery.failures:
            self.report(failure)
        self._collect_offers()

    @classmethod
    def load(cls, *, environ: Mapping[str, str] = os.environ, log_failures: bool = True) -> Plugins:
        """Scan and load. Never raises for a plugin that is broken."""
        return cls(discover(environ), log_failures=log_failures)

    # Offers.

    def specs(self, kind: Kind) -> list[Offer]:
        """Return all offers of a kind, sorted by name; a duplicate name once per plugin."""
        keys = sorted(key for key in self._offers if key[0] == kind)
        return [offer for key in keys for offer in self._offers[key]]

    def spec(self, kind: Kind, name: str) -> Spec:
        """Return a declaration. Raises PluginNotFound, DuplicateName or PluginBroken."""
        return self._offer(kind, name).spec

    def resolve(self, kind: Kind, name: str) -> Any:
        """Probe ``name``, then import its target. Raises as :meth:`spec`, and PluginBroken."""
        offer = self._offer(kind, name)
        who = _described(offer)
        if reason := self.why_unusable(offer):
            raise PluginBroken(f"{who} cannot be used here: {reason}")
        target = attempt(partial(attribute, offer.spec.target))
        if isinstance(target, Raised):
            raise PluginBroken(
                f"{who} failed to import {offer.spec.target!r}: {target}",
                hint=_reinstall(offer.plugin.distribution),
            ) from target.error
        return target

    def why_unusable(self, offer: Offer) -> str:
        """Return why this offer cannot be used on this machine; empty if it can."""
        if len(self._offers[offer.kind, offer.spec.name]) > 1:
            return _shared_name(self._offers[offer.kind, offer.spec.name])
        if not offer.spec.probe:
            return ""
        reason = attempt(lambda: str(attribute(offer.spec.probe)() or ""))
        return f"its probe failed: {reason}" if isinstance(reason, Raised) else reason

    # Hooks that plugins take part in.

    def eviction_policy(self, name: str) -> EvictionPolicy:
        """Return a new policy for ``cache_policy``. Raises ConfigError for an unknown name."""
        if not self._manager.has_plugin(_BUILTIN):
            self._manager.register(importlib.import_module(_BUILTIN), name=_BUILTIN)
        made: dict[str, EvictionPolicy] = {}
        before = len(self.failures)
        for plugin, policy in self._results("make_eviction_policy", name=name):
            if isinstance(policy, EvictionPolicy):
                made[plugin] = policy
            elif policy is not None:
                self._fail_hook(plugin, "make_eviction_policy", f"{policy!r} is no EvictionPolicy")
        if len(made) > 1:
            made.pop(_BUILTIN, None)
        if len(made) > 1:
            owners = " and ".join(sorted(self._distribution(plugin) for plugin in made))
            raise DuplicateName(
                f"cache_policy {name!r} is provided by {owners}", hint=_choose(sorted(made))
            )
        if made:
            return made.popitem()[1]
        if broken := self.failures[before:]:
            raise PluginBroken(f"no plugin made cache_policy {name!r}: {broken[0]}")
        raise ConfigError(
            f"unknown cache_policy {name!r}", hint=f"Known: {', '.join(self._policies())}"
        )

    def cache_opened(self, info: CacheInfo) -> None:
        """Tell every plugin that a cache has opened."""
        list(self._results("cache_opened", info=info))

    def cache_closing(self, info: CacheInfo) -> None:
        """Tell every plugin that a cache is about to close."""
        list(self._results("cache_closing", info=info))

    def report_headers(self) -> list[str]:
        """Return the line that each plugin has for ``lmcache-kit doctor``."""
        return [str(line) for _, line in self._results("report_header") if line]

    def report(self, failure: Failure) -> None:
        """Record what is wrong with a plugin, and log it as a warning unless logging is off."""
        self.failures.append(failure)
        if self._log_failures:
            logger.warning("%s", failure)

    def _collect_offers(self) -> None:
        for hook, (kind, spec_type) in _REGISTRATIONS.items():
            for plugin, specs in self._results(hook, collect=list):
                for spec in specs:
                    if problem := attempt(partial(_malformed, spec, spec_type)):
                        self._fail_hook(plugin, hook, str(problem))
                    else:
                        offer = Offer(kind, spec, self._infos[plugin])
                        self._offers[kind, spec.name].append(offer)
        for (kind, name), offers in self._offers.items():
            for offer in offers if len(offers) > 1 else []:
                error = f"{kind} {name!r}: {_shared_name(offers)}"
                self.report(Failure(offer.plugin.name, offer.plugin.distribution, "name", error))

    def _results(
        self, hook: str, *, collect: Callable[[Any], Any] = lambda result: result, **values: object
    ) -> Iterator[tuple[str, Any]]:
        """Yield plugin and result of each implementation. One that raises becomes a failure."""
        caller = getattr(self._manager.hook, hook)
        for implementation in reversed(caller.get_hookimpls()):
            arguments = {name: values[name] for name in implementation.argnames}
            call = partial(implementation.function, **arguments)
            result = attempt(partial(_collected, call, collect))
            if isinstance(result, Raised):
                self._fail_hook(implementation.plugin_name, hook, str(result))
            else:
                yield implementation.plugin_name, result

    def _fail_hook(self, plugin: str, hook: str, error: str) -> None:
        self.report(Failure(plugin, self._distribution(plugin), hook, error))

    def _distribution(self, plugin: str) -> str:
        return self._infos[plugin].distribution if plugin in self._infos else "lmcache-kit"

    def _policies(self) -> list[str]:
        hooked = self._manager.hook.make_eviction_policy.get_hookimpls()
        others = [each.plugin_name for each in hooked if each.plugin_name != _BUILTIN]
        return [*BUILTIN_POLICIES, *(f"those of plugin {name!r}" for name in others)]

    def _offer(self, kind: Kind, name: str) -> Offer:
        offers = self._offers.get((kind, name), [])
        if not offers:
            raise self._missing(kind, name)
        if len(offers) > 1:
            raise DuplicateName(
                f"{kind} {name!r} {_shared_name(offers)}",
                hint=_choose([offer.plugin.name for offer in offers]),
            )
        return offers[0]

    def _missing(self, kind: Kind, name: str) -> KitError:
        provider = distribution_of(kind, name)
        for failure in self.failures:
            if provider and failure.distribution == provider:
                hint = "" if failure.stage in _VERSIONS else _reinstall(provider)
                return PluginBroken(f"{kind} {name!r}: {failure}", hint=hint)
        for info in self.blocked:
            if provider and info.distribution == provider:
                return PluginNotFound(
                    f"{kind} {name!r} is provided by plugin {info.name!r} of {provider}, which "
                    f"{SELECTION_VARIABLE} keeps out",
                    hint=f"Let {info.name!r} through in {SELECTION_VARIABLE}, or unset it",
                )
        message = f"no {kind} {name!r} is installed"
        if provider:
            return PluginNotFound(message, hint=f"pip install {provider}")
        if self.failures:
            message += "; of what is installed, " + "; ".join(map(str, self.failures))
        known = ", ".join(sorted(each for what, each in self._offers if what == kind)) or "none"
        return PluginNotFound(message, hint=f"Installed: {known}")


def _collected(call: Callable[[], Any], collect: Callable[[Any], Any]) -> Any:
    result = call()
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("a hook must not be async")
    return collect(result)


def attribute(path: str) -> Any:
    """Import ``module:attribute``."""
    module, _, attribute = path.partition(":")
    value: Any = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    return value


def _malformed(spec: object, expected: type[Spec]) -> str:
    """Return what is wrong with a declaration; empty if nothing."""
    if not isinstance(spec, expected):
        return f"{spec!r} is no {expected.__name__}"
    if not isinstance(spec.name, str) or not spec.name:
        return f"{spec!r} has no name"
    paths = [spec.target, spec.config or spec.target, spec.probe or spec.target]
    if isinstance(spec, RouteSpec):
        paths += [spec.reply, spec.request or spec.reply]
    for path in paths:
        if not _TARGET.fullmatch(path):
            return f"{spec.name!r}: {path!r} is no 'module:attribute'"
    for key in spec.keys:
        if problem := _malformed_key(spec, key):
            return f"{spec.name!r}: key {key.name!r} {problem}"
    return ""


def _malformed_key(spec: Spec, key: ConfigKey) -> str:
    if not _KEY.fullmatch(key.name):
        return "is no name in lower case"
    if key.type not in KEY_TYPES:
        return f"has the type {key.type!r}; known: {', '.join(KEY_TYPES)}"
    if not spec.config or isinstance(spec, FrontendSpec | CommandSpec):
        return "sets an option, and options need a backend, codec or transport with a config model"
    if key.selects and (not isinstance(spec, BackendSpec) or "memory" in spec.capabilities):
        return "selects a tier, and this is none"
    if key.needs and key.needs not in {each.name for each in spec.keys}:
        return f"needs {key.needs!r}, which is not declared beside it"
    return ""


def _described(offer: Offer) -> str:
    plugin = offer.plugin
    return f"{offer.kind} {offer.spec.name!r} (plugin {plugin.name!r} of {plugin.distribution})"


def _shared_name(offers: list[Offer]) -> str:
    owners = sorted({offer.plugin.distribution for offer in offers})
    return f"is provided {len(offers)} times: by {' and by '.join(owners)}"


def _choose(plugins: list[str]) -> str:
    return f"Uninstall one, or block it with {SELECTION_VARIABLE}=-{plugins[-1]}"


def _reinstall(distribution: str) -> str:
    return f"Repair or reinstall it: pip install --force-reinstall {distribution}"
