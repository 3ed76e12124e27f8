"""The command ``controller``, also installed as ``lmcache_controller``."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import click

from lmcache_kit.cli._listening import ListenError, monitor_ports
from lmcache_kit.cli._serving import Settings, serve
from lmcache_kit.errors import ConfigError, KitError
from lmcache_kit.first_party import DEFAULT_FRONTEND
from lmcache_kit.protocol.zmq_auth import ControllerKeys

TOKEN_VARIABLE = "LMCACHE_KIT_TOKEN"  # noqa: S105
MONITOR_PORT = 9001
_LEVELS = ["debug", "info", "warning", "error"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", default="localhost", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9000,
    show_default=True,
    help="Port of the frontend; 0 lets the system choose.",
)
@click.option(
    "--monitor-port",
    type=click.IntRange(0, 65535),
    show_default=str(MONITOR_PORT),
    help="Port that cache processes connect to: their controller_url.",
)
@click.option(
    "--monitor-ports",
    callback=monitor_ports,
    metavar="JSON",
    help="""The same as LMCache writes it: '{"pull": 8300, "reply": 8400}'. """
    "Each port serves everything.",
)
@click.option(
    "--frontend",
    "frontends",
    multiple=True,
    default=(DEFAULT_FRONTEND,),
    show_default=True,
    metavar="NAME",
    help="Frontend to serve; may be repeated. `lmcache-kit plugins` lists them.",
)
@click.option(
    "--frontend-option",
    "options",
    multiple=True,
    metavar="NAME.KEY=VALUE",
    help=f"An option of one frontend, such as {DEFAULT_FRONTEND}.max_tokens=4096; may be repeated.",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the token that requests must carry. Also: {TOKEN_VARIABLE}.",
)
@click.option(
    "--curve",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Encrypt the monitor port, and let in only the workers that DIR has keys of. "
    "`lmcache-kit keys` makes it.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Serve an address other than loopback without a token or without --curve.",
)
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS, case_sensitive=False),
    default="warning",
    show_default=True,
)
def controller(
    *,
    host: str,
    port: int,
    monitor_port: int | None,
    monitor_ports: tuple[int, ...],
    frontends: tuple[str, ...],
    options: tuple[str, ...],
    token_file: Path | None,
    curve: Path | None,
    insecure: bool,
    log_level: str,
) -> None:
    """Run the controller, which knows which instance holds the KV of which tokens.

    Cache processes connect to the monitor port and report the chunks that they hold. Users and
    programs ask over REST.

    \b
    Example:
      lmcache_controller --host localhost --port 9000 --monitor-port 9001
      curl -X POST http://localhost:9000/lookup -d '{"tokens": [1, 2, 3]}'

    Every instance whose configuration says `enable_controller: true` and
    `controller_url: "localhost:9001"` then shows up by itself, in whichever order things start.
    """
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    ports = monitor_ports if monitor_port is None else (monitor_port, *monitor_ports)
    try:
        settings = Settings(
            host=host,
            port=port,
            monitor_ports=tuple(dict.fromkeys(ports)) or (MONITOR_PORT,),
            frontends=tuple(dict.fromkeys(frontends)),
            options=_by_frontend(options, frontends),
            token=_token(token_file, os.environ),
            insecure=insecure,
            keys=ControllerKeys.load(curve) if curve else None,
        )
        asyncio.run(serve(settings))
    except ListenError as error:
        _exit(error, status=1)
    except KitError as error:
        _exit(error, status=2)


def _exit(error: KitError, *, status: int) -> None:
    click.echo(f"Error: {error}", err=True)
    raise SystemExit(status)


def _token(file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The token, from the file before the environment; None when neither is given."""
    if file is None:
        return environ.get(TOKEN_VARIABLE) or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file} cannot be read: {error}") from error
    if not token:
        raise ConfigError(f"--token-file {file} is empty", hint="Write the token into it")
    return token


def _by_frontend(written: tuple[str, ...], frontends: tuple[str, ...]) -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = {}
    for each in written:
        where, equals, value = each.partition("=")
        name, dot, key = where.partition(".")
        if not (equals and dot and key) or name not in frontends:
            raise ConfigError(
                f"--frontend-option {each!r} is not NAME.KEY=VALUE of a frontend that is served",
                hint=f"Served: {', '.join(frontends)}",
            )
        options.setdefault(name, {})[key] = value
    return options


if __name__ == "__main__":
    controller()
