"""``lmcache-kit keys``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from zmq.auth import create_certificates

from lmcache_kit.errors import ConfigError
from lmcache_kit.protocol.zmq_auth import CONTROLLER, WORKERS

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="NAME",
    help="Make keys for a worker too; may be repeated, and run again for more workers.",
)
def keys(folder: Path, workers: tuple[str, ...]) -> None:
    """Make the keys that encrypt the monitor port and say who may connect to it.

    Each is a pair: NAME.key is public, NAME.key_secret stays with its owner. DIR stays with the
    controller; a worker needs controller.key and its own .key_secret. Nothing is ever overwritten.

    \b
    Example:
      lmcache-kit keys ~/keys --worker gpu-1
      lmcache_controller --host 10.0.0.5 --curve ~/keys
      scp ~/keys/controller.key ~/keys/workers/gpu-1.key_secret gpu-1:

    \b
    and in the configuration of gpu-1:
      controller_key: "~/controller.key"
      worker_key: "~/gpu-1.key_secret"

    The controller reads the workers' keys when it starts. To shut a worker out, remove its .key
    from DIR/workers and restart the controller.
    """
    wanted = [folder / WORKERS / name for name in map(_named, dict.fromkeys(workers))]
    controller = folder / CONTROLLER
    if not wanted or not any(map(_exists, _pair(controller))):
        wanted.insert(0, controller)
    for file in (file for base in wanted for file in _pair(base) if _exists(file)):
        raise ConfigError(
            f"{file} exists and is not overwritten",
            hint="Choose another worker's name with --worker, or another folder",
        )
    with _only_ours():
        for base in wanted:
            _make(base)
    for base in wanted:
        click.echo("\n".join(map(str, _pair(base))))


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--worker {name!r} is no name for a file", hint="Use letters, digits, '.', '_' and '-'"
        )
    return name


def _pair(base: Path) -> tuple[Path, Path]:
    return base.with_name(f"{base.name}.key"), base.with_name(f"{base.name}.key_secret")


def _exists(file: Path) -> bool:
    """A link that leads nowhere exists too: writing would follow it."""
    return os.path.lexists(file)


@contextmanager
def _only_ours() -> Iterator[None]:
    """What is made in the meantime is for its owner only, from the first moment on."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _make(base: Path) -> None:
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        if base.parent.stat().st_mode & 0o077:
            raise ConfigError(
                f"{base.parent} is open to others, and secret keys shall lie there",
                hint=f"Close it with 'chmod 700 {base.parent}', or name a new folder",
            )
        create_certificates(base.parent, base.name)
    except OSError as error:
        raise ConfigError(f"cannot make {base}.key: {error.strerror or error}") from None
