"""Compose the controller and its frontends, and serve until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import pkgutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click
from pydantic import ValidationError

from lmcache_kit.cli._listening import ListenError, listening, open_to_the_network
from lmcache_kit.controller.controller import Controller
from lmcache_kit.errors import ConfigError
from lmcache_kit.interfaces.frontend import Frontend
from lmcache_kit.plugins import Plugins
from lmcache_kit.protocol.zmq_auth import ControllerKeys

_STOP_S = 1.8
"""A stop that takes longer is abandoned, so that the process ends within two seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The options of the command line. ``options``: per frontend, key to value as written."""

    host: str
    port: int
    monitor_ports: tuple[int, ...]
    frontends: tuple[str, ...]
    options: Mapping[str, Mapping[str, str]]
    token: str | None = field(repr=False)
    insecure: bool
    keys: ControllerKeys | None = None


async def serve(settings: Settings) -> None:
    """Compose, serve until a signal comes, stop."""
    plugins = Plugins.load()
    controller = Controller(settings.host, settings.monitor_ports, keys=settings.keys)
    frontends = [_frontend(plugins, name, controller, settings) for name in settings.frontends]
    _check_monitor_port(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        try:
            await controller.start()
        except ConfigError as error:
            raise ListenError(error.message, hint=error.hint) from None
        for name, frontend in zip(settings.frontends, frontends, strict=True):
            with listening(name, settings.host, settings.port):
                await frontend.start()
        click.echo(_where(settings, controller, frontends))
        await stop.wait()
    finally:
        await _stop(controller, frontends)


def _check_monitor_port(settings: Settings) -> None:
    """Raises ConfigError for an unprotected port on the network without ``--insecure``."""
    if settings.keys or not open_to_the_network(settings.host):
        return
    if not settings.insecure:
        raise ConfigError(
            f"--host {settings.host} opens the monitor port to the network without encryption "
            "or authentication",
            hint="Make keys with 'lmcache-kit keys DIR --worker NAME' and give --curve DIR, or "
            "accept the risk with --insecure",
        )
    log.warning(
        "the monitor port is open to the network without encryption or authentication: "
        "keep it behind a firewall"
    )


def _frontend(plugins: Plugins, name: str, controller: Controller, settings: Settings) -> Frontend:
    """Build a frontend. Of the controller's options it gets those that its model has."""
    spec = plugins.spec("frontend", name)
    target = plugins.resolve("frontend", name)
    if not spec.config:
        frontend: Frontend = target(controller)
        return frontend
    model = pkgutil.resolve_name(spec.config)
    shared = {
        "host": settings.host,
        "port": settings.port,
        "token": settings.token,
        "insecure": settings.insecure,
    }
    values: dict[str, Any] = {k: v for k, v in shared.items() if k in model.model_fields}
    values |= settings.options.get(name, {})
    try:
        frontend = target(controller, model(**values))
    except ValidationError as error:
        # Never the value: it may be the token.
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"frontend {name}, option {where!r}: {first['msg']}",
            hint=f"Options: {', '.join(model.model_fields)}",
        ) from None
    return frontend


def _where(settings: Settings, controller: Controller, frontends: list[Frontend]) -> str:
    served = [
        f"{name} on {', '.join(frontend.endpoints) or 'an address of its own'}"
        for name, frontend in zip(settings.frontends, frontends, strict=True)
    ]
    return (
        f"lmcache_controller: {'; '.join(served)}; "
        f"cache processes on {', '.join(controller.endpoints)}; Ctrl-C stops"
    )


async def _stop(controller: Controller, frontends: list[Frontend]) -> None:
    """All at once: the controller tells those who wait for a worker that it is stopping."""
    try:
        async with asyncio.timeout(_STOP_S):
            await asyncio.gather(*(frontend.stop() for frontend in frontends), controller.stop())
    except TimeoutError:
        log.warning("stopped without waiting for the rest, after %.1f s", _STOP_S)
