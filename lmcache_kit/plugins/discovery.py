"""Scan distributions for plugins and load each in a try of its own.

pluggy's own loading stops at the first broken plugin without naming it, drops the second of two
equal entry-point names, and accepts a misspelt hook.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import importlib_metadata
import pluggy

from lmcache_kit import __version__, hookspecs
from lmcache_kit.plugins.records import Failure, PluginInfo, Raised, attempt

SELECTION_VARIABLE = "LMCACHE_KIT_PLUGINS"

_GROUP = re.compile(rf"{hookspecs.PROJECT}\.v(\d+)")


class Candidate(NamedTuple):
    """An installed plugin, before anything of it is imported. ``requires``: requirements of its
    distribution, as in its metadata."""

    info: PluginInfo
    entry_point: importlib_metadata.EntryPoint
    requires: list[str]


class DistributionMetadata(NamedTuple):
    """Name and version of a distribution, its entry points by group, and its requirements."""

    name: str
    version: str
    groups: dict[str, list[importlib_metadata.EntryPoint]]
    requires: list[str]


@dataclass
class Discovery:
    """The result of a scan. ``manager`` holds the plugins of ``loaded``, and no others."""

    manager: pluggy.PluginManager
    loaded: list[PluginInfo] = field(default_factory=list)
    blocked: list[PluginInfo] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def discover(environ: Mapping[str, str]) -> Discovery:
    """Load every plugin that is installed and selected. A failure is a record, never raised."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    found = Discovery(manager)
    candidates = sorted(
        _scan(found.failures), key=lambda each: (each.info.name, each.info.distribution)
    )
    for candidate in _selected(_unambiguous(candidates, found), environ, found):
        _load(candidate, found)
    return found


def _scan(failures: list[Failure]) -> Iterator[Candidate]:
    """Yield installed plugins. Of a distribution that is on the path twice, the first counts."""
    seen = set()
    for distribution in importlib_metadata.distributions():
        described = attempt(partial(_describe, distribution))
        if isinstance(described, Raised):
            where = f"a distribution in {distribution.locate_file('')}"
            failures.append(Failure("?", where, "metadata", str(described)))
            continue
        if described is None or _normalized(described.name) in seen:
            continue
        seen.add(_normalized(described.name))
        own = described.groups.pop(hookspecs.ENTRY_POINT_GROUP, [])
        for entry_point in own:
            info = PluginInfo(entry_point.name, described.name, described.version)
            yield Candidate(info, entry_point, described.requires)
        if not own:
            failures += _other_versions(described.name, described.groups)


def _describe(distribution: Any) -> DistributionMetadata | None:
    """Read metadata; None without an entry point of ours. Raises anything for broken metadata."""
    groups: dict[str, list[importlib_metadata.EntryPoint]] = defaultdict(list)
    for entry_point in distribution.entry_points:
        if _GROUP.fullmatch(entry_point.group):
            groups[entry_point.group].append(entry_point)
    if not groups:
        return None
    requires = list(distribution.requires or [])
    return DistributionMetadata(distribution.name, distribution.version, groups, requires)


def _other_versions(
    distribution: str, groups: Mapping[str, list[importlib_metadata.EntryPoint]]
) -> Iterator[Failure]:
    for group, entry_points in groups.items():
        theirs = int(group.rpartition("v")[2])
        other = "lmcache-kit" if theirs > hookspecs.API_VERSION else distribution
        for entry_point in entry_points:
            error = (
                f"it is for plugin API {theirs} and this lmcache-kit speaks "
                f"{hookspecs.API_VERSION}; upgrade with: pip install -U {other}"
            )
            yield Failure(entry_point.name, distribution, "api version", error)


def _unambiguous(candidates: list[Candidate], found: Discovery) -> list[Candidate]:
    """Return the candidates with a unique name. The others become failures that name each other."""
    by_name: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_name[candidate.info.name].append(candidate)
    for name, group in by_name.items():
        owners = [candidate.info.distribution for candidate in group]
        for owner in owners if len(group) > 1 else []:
            others = ", ".join(each for each in owners if each != owner) or owner
            error = f"{others} has a plugin of this name too; uninstall one of them"
            found.failures.append(Failure(name, owner, "name", error))
    return [group[0] for group in by_name.values() if len(group) == 1]


def _selected(
    candidates: list[Candidate], environ: Mapping[str, str], found: Discovery
) -> Iterator[Candidate]:
    """Yield what ``LMCACHE_KIT_PLUGINS`` selects: ``a,b`` allows only these, ``-a`` blocks one."""
    words = [word.strip("\"' ") for word in environ.get(SELECTION_VARIABLE, "").split(",")]
    allowed = {_normalized(word) for word in words if word and not word.startswith("-")}
    denied = {_normalized(word[1:]) for word in words if word.startswith("-")}
    for candidate in candidates:
        name = _normalized(candidate.info.name)
        if name in denied or (allowed and name not in allowed):
            found.blocked.append(candidate.info)
        else:
            yield candidate
    installed = {_normalized(candidate.info.name): candidate.info.name for candidate in candidates}
    for name in sorted(allowed - installed.keys()):
        listed = ", ".join(sorted(installed.values())) or "none"
        error = f"{SELECTION_VARIABLE} allows it and it is not installed; installed: {listed}"
        found.failures.append(Failure(name, "no distribution", "selection", error))


def _normalized(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _named(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _load(candidate: Candidate, found: Discovery) -> None:
    info, manager = candidate.info, found.manager
    if unmet := attempt(partial(_unmet, candidate)):
        stage = "metadata" if isinstance(unmet, Raised) else "requirement"
        found.failures.append(Failure(info.name, info.distribution, stage, str(unmet)))
        return
    plugin = attempt(candidate.entry_point.load)
    if isinstance(plugin, Raised):
        found.failures.append(Failure(info.name, info.distribution, "import", str(plugin)))
        return
    registered = attempt(partial(_register, manager, plugin, info.name))
    if isinstance(registered, Raised):
        # pluggy 1.6 leaves a plugin registered by half when one of its hooks is wrong.
        if manager.has_plugin(info.name):
            manager.unregister(name=info.name)
        found.failures.append(Failure(info.name, info.distribution, "hooks", str(registered)))
        return
    module = sys.modules.get(candidate.entry_point.module)
    found.loaded.append(replace(info, path=getattr(module, "__file__", None) or ""))


def _unmet(candidate: Candidate) -> str:
    """Return why this release of lmcache-kit does not meet the plugin's requirement, or nothing.

    Raises for a requirement that cannot be parsed.
    """
    from packaging.requirements import Requirement

    ours = [each for each in candidate.requires if _normalized(_named(each)) == hookspecs.PROJECT]
    for requirement in map(Requirement, ours):
        applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
        if applies and not requirement.specifier.contains(__version__, prereleases=True):
            both = f"lmcache-kit {candidate.info.distribution}"
            return (
                f"it requires lmcache-kit{requirement.specifier} and this is {__version__}; "
                f"get two that fit with: pip install -U {both}"
            )
    return ""


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Register a plugin. Raises for unknown hooks and for wrappers."""
    if twin := manager.get_name(plugin):
        raise ValueError(f"it names the same object as plugin {twin!r}")
    manager.register(plugin, name=name)
    manager.check_pending()
    for caller in manager.get_hookcallers(plugin) or []:
        for implementation in caller.get_hookimpls():
            wraps = implementation.wrapper or implementation.hookwrapper
            if wraps and implementation.plugin is plugin:
                raise ValueError(f"{caller.name} is a wrapper; wrappers are not supported")
