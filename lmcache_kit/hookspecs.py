"""All hook specifications.

A plugin is a distribution with an entry point in the group ``lmcache_kit.v1``. The entry point
names a light module (no torch, no aiohttp, no pydantic) that implements some of these hooks with
:data:`hookimpl`. Hooks run at composition, never on a hot path. They return declarations and build
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache_kit.interfaces import CacheInfo, EvictionPolicy
    from lmcache_kit.specs import BackendSpec, CodecSpec, CommandSpec, FrontendSpec, TransportSpec

PROJECT = "lmcache_kit"
API_VERSION = 1
ENTRY_POINT_GROUP = f"{PROJECT}.v{API_VERSION}"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Declarations. Called once, when plugins are listed or composed.


@hookspec
def register_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Return the storage backends that this plugin offers."""


@hookspec
def register_codecs() -> Iterable[CodecSpec]:  # type: ignore[empty-body]
    """Return the codecs that this plugin offers."""


@hookspec
def register_transports() -> Iterable[TransportSpec]:  # type: ignore[empty-body]
    """Return the transports that this plugin offers."""


@hookspec
def register_frontends() -> Iterable[FrontendSpec]:  # type: ignore[empty-body]
    """Return the control-plane frontends that this plugin offers."""


@hookspec
def register_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Return the subcommands of ``lmcache-kit`` that this plugin offers."""


# Events and policies.


@hookspec(firstresult=True)
def make_eviction_policy(name: str) -> EvictionPolicy | None:
    """Return a new eviction policy for ``cache_policy: <name>``, or None for an unknown name.

    Called once per location when a cache opens. The kit's own LRU, FIFO and LFU come last.
    """


@hookspec
def cache_opened(info: CacheInfo) -> None:
    """React to the opening of a cache. Called in the cache process, before its first client."""


@hookspec
def cache_closing(info: CacheInfo) -> None:
    """React to the end of a cache. Called in the cache process, after its last client."""


@hookspec
def report_header() -> str:  # type: ignore[empty-body]
    """Return one line for ``lmcache-kit doctor``."""
