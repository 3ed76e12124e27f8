"""Declarations that a plugin's hooks return, before any of its implementation is imported.

``target`` is a dotted path ``module:attribute``. It is imported only when the configuration names
the plugin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["backend", "codec", "transport", "frontend", "command"]

KINDS: tuple[Kind, ...] = ("backend", "codec", "transport", "frontend", "command")


@dataclass(frozen=True, slots=True)
class _Spec:
    """Base of all declarations.

    ``name``: its name in configurations and requests. ``target``: ``module:attribute`` of the class
    or factory. ``config``: ``module:attribute`` of a pydantic model for its options, or empty.
    ``capabilities``: names of optional capabilities. ``probe``: ``module:attribute`` of a function
    that returns the reason why the plugin cannot work on this machine, or an empty string.
    """

    name: str
    target: str
    summary: str
    config: str = ""
    capabilities: frozenset[str] = field(default_factory=frozenset)
    probe: str = ""


@dataclass(frozen=True, slots=True)
class BackendSpec(_Spec):
    """A storage backend; ``name`` is the location that control operations address.

    ``target`` is a :class:`~lmcache_kit.interfaces.Backend` class, or, with the capability
    ``"memory"``, a :class:`~lmcache_kit.interfaces.MemoryBackend` class.
    """


@dataclass(frozen=True, slots=True)
class CodecSpec(_Spec):
    """A codec; ``name`` is the ``method`` of compress and decompress."""


@dataclass(frozen=True, slots=True)
class TransportSpec(_Spec):
    """A transport between cache processes; ``name`` is a value of ``transfer_channel``.

    ``target`` is a :class:`~lmcache_kit.interfaces.Transport` class. ``transfer_channel: auto``
    tries transports with the capability ``"one-sided"`` first: these read a peer's memory without
    help from the peer's processor.
    """


@dataclass(frozen=True, slots=True)
class FrontendSpec(_Spec):
    """A frontend of the controller, such as ``http``."""


@dataclass(frozen=True, slots=True)
class CommandSpec(_Spec):
    """A subcommand of ``lmcache-kit``; ``target`` is a click command."""


Spec: TypeAlias = BackendSpec | CodecSpec | TransportSpec | FrontendSpec | CommandSpec
