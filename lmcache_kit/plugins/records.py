"""What is known about plugins, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lmcache_kit.specs import Kind, Spec

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a plugin, or one of its hooks, cannot be used.

    ``stage``: where it went wrong: ``"metadata"``, ``"api version"``, ``"selection"``,
    ``"name"``, ``"requirement"``, ``"import"``, ``"hooks"``, or the name of the hook that failed.
    ``error`` says what to do as well, where reinstalling it would not help.
    """

    plugin: str
    distribution: str
    stage: str
    error: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} failed ({self.stage}): {self.error}"


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """An installed plugin. ``name``: its entry point's. ``path``: where its module lies, empty
    if it was not loaded."""

    name: str
    distribution: str
    version: str
    path: str = ""


class Offer(NamedTuple):
    """One thing that a plugin offers."""

    kind: Kind
    spec: Spec
    plugin: PluginInfo


class Raised(NamedTuple):
    """What a plugin's code raised instead of an answer."""

    error: BaseException

    def __str__(self) -> str:
        text = " ".join(str(self.error).split())
        name = type(self.error).__name__
        return f"{name}: {text}" if text else name


def attempt(call: Callable[[], _T]) -> _T | Raised:
    """Run a stranger's code: it may raise anything, or try to exit, and nobody else suffers."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to all plugin code
        return Raised(error)
