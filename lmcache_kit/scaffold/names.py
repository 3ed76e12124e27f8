"""Names of a new plugin: distribution, package, class, and the name in configurations."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import importlib_metadata

from lmcache_kit.errors import KitError
from lmcache_kit.plugins import Plugins
from lmcache_kit.specs import Kind

KINDS: Mapping[Kind, tuple[str, ...]] = {
    "backend": ("pydantic>=2.7",),
    "codec": ("msgspec>=0.19", "xxhash>=3.4"),
    "frontend": ("msgspec>=0.19", "pydantic>=2.7"),
    "transport": ("xxhash>=3.4",),
}
"""Kinds that can be generated, with the distributions that their templates need."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")
_RESERVED: Mapping[Kind, tuple[str, ...]] = {"transport": ("auto",)}
"""Names that have another meaning in configurations, by kind."""
_LETTERS = "letters, digits, and single - or _ between them, starting with a letter"
_MAX_NAME = 64


class ScaffoldError(KitError, ValueError):
    """A plugin cannot be generated from these arguments; nothing was written."""


@dataclass(frozen=True, slots=True)
class Project:
    """Names of a plugin to generate.

    ``distribution`` is the name for pip, ``offer`` the name in configurations and requests.
    """

    kind: Kind
    distribution: str
    offer: str

    @classmethod
    def named(cls, kind: str, name: str, *, distribution: str = "", offer: str = "") -> Project:
        """Derive all names. Raises ScaffoldError for an unknown kind or an unusable name."""
        if kind not in KINDS:
            raise ScaffoldError(f"unknown kind {kind!r}", hint=f"Known: {', '.join(KINDS)}")
        dashes = _checked("name", distribution or name).replace("_", "-").lower()
        offer = _checked("offer", offer or name)
        project = cls(next(each for each in KINDS if each == kind), dashes, offer)
        if offer in _RESERVED.get(project.kind, ()):
            raise ScaffoldError(
                f"a {kind} cannot be called {offer!r}, which has a meaning of its own",
                hint="Choose another one with --name",
            )
        if keyword.iskeyword(project.package) or project.package in sys.stdlib_module_names:
            raise ScaffoldError(
                f"{project.package!r} cannot be a package: Python has a module of that name",
                hint=f"Choose another one: --distribution my-{project.distribution}",
            )
        return project

    @property
    def package(self) -> str:
        """Name of the package, and of the entry point."""
        return self.distribution.replace("-", "_")

    @property
    def class_name(self) -> str:
        """Name of the class, such as ``AcmeZipCodec``."""
        words = "".join(word.capitalize() for word in self.distribution.split("-"))
        return (words.removesuffix(self.kind.capitalize()) or "My") + self.kind.capitalize()


def check_free(project: Project, plugins: Plugins) -> None:
    """Raise ScaffoldError if an installed plugin, distribution or module has one of the names."""
    for offer in plugins.specs(project.kind):
        if offer.spec.name == project.offer:
            raise ScaffoldError(
                f"the {project.kind} {project.offer!r} exists already, from "
                f"{offer.plugin.distribution} {offer.plugin.version}",
                hint="Choose another one with --name, or uninstall that one",
            )
    try:
        installed = importlib_metadata.version(project.distribution)
    except importlib_metadata.PackageNotFoundError:
        installed = ""
    if installed:
        raise ScaffoldError(
            f"the distribution {project.distribution!r} is installed already, in version "
            f"{installed}",
            hint="Choose another one with --distribution, or uninstall that one",
        )
    if importlib.util.find_spec(project.package):
        raise ScaffoldError(
            f"a module {project.package!r} is installed already",
            hint="Choose another one with --distribution",
        )


def _checked(what: str, name: str) -> str:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        option = "NAME or --distribution" if what == "name" else "NAME or --name"
        raise ScaffoldError(
            f"{name!r} cannot be the {what} of a plugin",
            hint=f"{option} has {_LETTERS}; at most {_MAX_NAME} of them",
        )
    return name
