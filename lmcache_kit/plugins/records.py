"""Records about plugins: what is installed, what it offers, what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lmcache_kit.specs import Kind, Spec

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a plugin, or one of its hooks, cannot be used.

    ``stage``: the step that failed: ``"metadata"``, ``"api version"``, ``"selection"``,
    ``"name"``, ``"requirement"``, ``"import"``, ``"hooks"``, or the name of the hook that failed.
    ``error`` includes the remedy where reinstalling would not help.
    """

    plugin: str
    distribution: str
    stage: str
    error: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} failed ({self.stage}): {self.error}"


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """An installed plugin. ``name``: that of its entry point. ``path``: the file of its module,
    empty if it was not loaded."""

    name: str
    distribution: str
    version: str
    path: str = ""


class Offer(NamedTuple):
    """A declaration, and the plugin that it comes from."""

    kind: Kind
    spec: Spec
    plugin: PluginInfo


class Raised(NamedTuple):
    """The exception that code of a plugin raised."""

    error: BaseException

    def __str__(self) -> str:
        text = " ".join(str(self.error).split())
        name = type(self.error).__name__
        return f"{name}: {text}" if text else name


def attempt(call: Callable[[], _T]) -> _T | Raised:
    """Run code of a plugin; return what it raises, SystemExit included."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to all plugin code
        return Raised(error)
