"""Declarations: what a plugin says about what it offers, before any of it is imported.

A hook returns these; nothing is built in a hook. ``target`` is a dotted path ``module:attribute``
that is imported only when the configuration asks for the name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["backend", "codec", "transport", "frontend", "route", "command"]

KINDS: tuple[Kind, ...] = ("backend", "codec", "transport", "frontend", "route", "command")


@dataclass(frozen=True, slots=True)
class _Spec:
    """``name``: what configurations and requests call it. ``target``: ``module:attribute`` of the
    class or factory. ``config``: ``module:attribute`` of a pydantic model for its options, or
    empty. ``capabilities``: names of the optional powers it claims. ``probe``: ``module:attribute``
    of a function that returns an empty string, or the reason why it cannot work on this machine.
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
    tries those with the capability ``"one-sided"`` first: they read a peer's memory without its
    help.
    """


@dataclass(frozen=True, slots=True)
class FrontendSpec(_Spec):
    """A way into the controller, such as ``http``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec(_Spec):
    """A route that the frontends of the controller serve beside their own, such as ``http`` does.

    ``target`` is an ``async def handler(controller, request)`` that returns an instance of
    ``reply``; see :data:`~lmcache_kit.interfaces.routes.RouteHandler`. ``method`` is ``GET``,
    ``POST``, ``PUT`` or ``DELETE``. ``path`` may have names in braces, such as ``/tenants/{name}``,
    each of which stands for one segment and is a field of the request. ``request`` and ``reply``
    are ``module:attribute`` of pydantic models; an empty ``request`` means that there is nothing
    to ask. Fields of the request are read from path and query where the method is ``GET`` or
    ``DELETE`` or the path has names, else from a JSON body.
    """

    method: str
    path: str
    reply: str
    request: str = ""


@dataclass(frozen=True, slots=True)
class CommandSpec(_Spec):
    """A subcommand of ``lmcache-kit``; ``target`` is a click command."""


Spec: TypeAlias = BackendSpec | CodecSpec | TransportSpec | FrontendSpec | RouteSpec | CommandSpec
