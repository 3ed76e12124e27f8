"""Declare a key of the configuration, and read its declaration back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from pydantic import Field

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Scope: TypeAlias = Literal["cache", "client", "accepted"]
"""Who reads a key. ``"cache"``: the cache process; two that differ in such a key are not the same.
``"client"``: each client for itself. ``"accepted"``: nothing; it is there for LMCache's users."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """A key. ``help``: the first sentence says what it is. ``aliases``: other spellings.
    ``lmcache``: LMCache has this key too. ``plugin`` and ``type``: for a key of a plugin, the name
    of the backend, codec or transport, and how values are read; empty for a key of the kit."""

    name: str
    default: Any
    help: str
    scope: Scope
    aliases: tuple[str, ...] = ()
    lmcache: bool = True
    plugin: str = ""
    type: str = ""

    @property
    def summary(self) -> str:
        """The first sentence of the help."""
        return self.help.partition(". ")[0].rstrip(".")


def key(
    default: Any,
    help: str,
    *,
    scope: Scope,
    aliases: tuple[str, ...] = (),
    lmcache: bool = True,
    **limits: Any,
) -> Any:
    """Return the field of a model that is a key; ``limits`` are those of pydantic's ``Field``."""
    extra: Any = {"scope": scope, "aliases": list(aliases), "lmcache": lmcache}
    return Field(default=default, description=help, json_schema_extra=extra, **limits)


def declared(name: str, field: FieldInfo) -> Declaration:
    """Return the declaration of a field that :func:`key` made."""
    extra = cast("dict[str, Any]", field.json_schema_extra)
    return Declaration(
        name,
        field.default,
        field.description or "",
        extra["scope"],
        tuple(extra["aliases"]),
        extra["lmcache"],
    )
