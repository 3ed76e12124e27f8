"""Declare what a plugin offers, before any of it is imported.

A hook returns these declarations; nothing is built in a hook. ``target``, ``config`` and ``probe``
are dotted paths ``module:attribute``, imported only when the configuration asks for the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from lmcache_kit.metrics import MetricSpec


Kind: TypeAlias = Literal["backend", "codec", "transport", "frontend", "route", "command"]
KINDS: tuple[Kind, ...] = get_args(Kind)

KeyType: TypeAlias = Literal["text", "number", "folder", "list"]
"""How the value of a key is read, before the model of the options checks it. ``"folder"``: an
absolute path, one below ``~/``, or a ``file:///`` URL; ``~`` is expanded. ``"list"``: texts, or one
text with commas."""

KEY_TYPES: tuple[KeyType, ...] = get_args(KeyType)


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key at the top of a configuration that sets an option of a plugin.

    Every option can be set under ``backend_options``, ``codec_options`` or ``transport_options``.
    A key is a second spelling of one, such as the one that users of LMCache know.

    ``name``: the key, in lower case. ``option``: field of the ``config`` model that it sets.
    ``help``: the first sentence says what the key is. ``default``: the value that sets nothing.
    ``selects``: a value also adds the backend to ``tiers``. ``needs``: another key of the same
    declaration, without which this one is an error.
    """

    name: str
    option: str
    help: str
    type: KeyType = "text"
    default: object = None
    selects: bool = False
    needs: str = ""


@dataclass(frozen=True, slots=True)
class _Spec:
    """``name``: the name in configurations and requests. ``target``: ``module:attribute`` of the
    class or factory. ``config``: ``module:attribute`` of a pydantic model of its options, or empty.
    ``capabilities``: names of the optional protocols that it supports. ``probe``:
    ``module:attribute`` of a function that returns an empty string, or the reason why the target
    cannot work on this machine. ``keys``: keys of the configuration that set its options.
    ``inherits``: keys of the kit whose values become options as soon as one of ``keys`` is given.
    ``metrics``: the metrics that it counts.
    """

    name: str
    target: str
    summary: str
    config: str = ""
    capabilities: frozenset[str] = field(default_factory=frozenset)
    probe: str = ""
    keys: tuple[ConfigKey, ...] = ()
    inherits: Mapping[str, str] = field(default_factory=dict, hash=False)
    metrics: tuple[MetricSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class BackendSpec(_Spec):
    """A storage backend; ``name`` is the location that control operations address.

    ``target`` is a :class:`~lmcache_kit.interfaces.Backend` class, or, with the capability
    ``"memory"``, a :class:`~lmcache_kit.interfaces.MemoryBackend` class, which ``memory_backend``
    may name.
    """


@dataclass(frozen=True, slots=True)
class CodecSpec(_Spec):
    """A codec; ``name`` is the ``method`` of compress and decompress."""


@dataclass(frozen=True, slots=True)
class TransportSpec(_Spec):
    """A transport between cache processes; ``name`` is a value of ``transfer_channel``.

    ``target`` is a :class:`~lmcache_kit.interfaces.Transport` class. ``transfer_channel: auto``
    tries transports with the capability ``"one-sided"`` first: they read the memory of a peer
    without its help. One with the capability ``"any-network"`` works wherever two processes reach
    each other by TCP, and serves where the named transport cannot.
    """


@dataclass(frozen=True, slots=True)
class FrontendSpec(_Spec):
    """A server in the controller that users and programs talk to, such as REST over HTTP."""


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
    """A subcommand of ``lmcache-kit``; ``target`` is a click command.

    With ``click.pass_obj`` it gets a :class:`~lmcache_kit.interfaces.CommandContext`.
    """


Spec: TypeAlias = BackendSpec | CodecSpec | TransportSpec | FrontendSpec | RouteSpec | CommandSpec
