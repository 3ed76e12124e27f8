"""The command ``lmcache-kit gc``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import click
from pydantic import ValidationError

from lmcache_kit.errors import BackendError, ConfigError
from lmcache_kit.interfaces import CommandContext
from lmcache_kit_disk_backend.abandoned import FoundStore, find, remove
from lmcache_kit_disk_backend.options import DiskOptions

BACKEND = "LocalDiskBackend"
_COLUMNS = ("folder", "instance", "state", "chunks", "size", "unused for", "last process")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _seconds(context: click.Context, parameter: click.Parameter, written: str) -> float:
    """Read an age: a number and a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", written.strip())
    if found is None:
        raise click.BadParameter(f"{written!r} is no age; write it as 12h, 30d or 8w")
    return float(found[1]) * _UNITS[found[2]]


@click.command("gc")
@click.option(
    "--folder",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder to look into: a local_disk. May be repeated. Default: that of the configuration, "
    "else that of the backend's default.",
)
@click.option("--delete", is_flag=True, help="Remove what is free and old. Without it: only list.")
@click.option(
    "--older-than",
    "older_than_s",
    callback=_seconds,
    metavar="AGE",
    default="7d",
    show_default=True,
    help="Remove only what has not been used for so long: 12h, 30d, 8w.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
@click.pass_obj
def command(
    context: CommandContext,
    *,
    folders: tuple[Path, ...],
    delete: bool,
    older_than_s: float,
    as_json: bool,
) -> None:
    """List the folders of KV on disk, and remove those that nobody uses any more.

    Each instance has a folder of its own in its `local_disk`, which stays when the instance has
    gone for good. A folder that a process uses is never removed.

    \b
    Examples:
      lmcache-kit gc
      lmcache-kit gc --folder /var/cache/kv --older-than 30d --delete
    """
    rows = []
    bases = folders or (_configured(context),)
    for base in bases:
        for store in _stores(base, must_exist=bool(folders)):
            old = not store.in_use and store.older_than(older_than_s)
            state = "in use" if store.in_use else "dead" if old else "free"
            if delete and old:
                try:
                    why = remove(store)
                except OSError as error:
                    why = error.strerror or str(error)
                state = f"stays: {why}" if why else "removed"
            rows.append((store, state))
    if as_json:
        click.echo(json.dumps([_as_json(store, state) for store, state in rows], indent=2))
        return
    if not rows:
        click.echo(f"No KV lies in {', '.join(map(str, bases))}")
        return
    _print_table([_COLUMNS, *(_as_row(store, state) for store, state in rows)])
    dead = [store for store, state in rows if state == "dead"]
    if dead:
        size = _size(sum(store.nbytes for store in dead))
        click.echo(f"{len(dead)} of them with {size} would be removed with --delete")


def _configured(context: CommandContext) -> Path:
    """Return the folder that the configuration names, or the backend's default."""
    try:
        return DiskOptions.model_validate(context.options(BACKEND)).path
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"the options of {BACKEND} cannot be used: {first['msg']}",
            hint="'lmcache-kit validate' tells more; or name a --folder",
        ) from None


def _stores(base: Path, *, must_exist: bool) -> list[FoundStore]:
    base = base.expanduser()
    try:
        return list(find(base))
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"--folder {base}: there is no such folder") from None
        return []
    except OSError as error:
        raise BackendError(f"cannot read {base}: {error.strerror or error}") from None


def _print_table(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _as_row(store: FoundStore, state: str) -> tuple[str, ...]:
    owner = store.owner
    return (
        str(store.path),
        (owner.subfolder or "(none)") if owner else "(unknown)",
        state,
        str(store.files),
        _size(store.nbytes),
        _age(time.time() - store.last_used),
        f"{owner.pid} on {owner.host}" if owner else "",
    )


def _as_json(store: FoundStore, state: str) -> dict[str, object]:
    owner = store.owner
    return {
        "folder": str(store.path),
        "instance": owner.subfolder if owner else None,
        "host": owner.host if owner else None,
        "pid": owner.pid if owner else None,
        "opened": owner.opened if owner else None,
        "state": state,
        "chunks": store.files,
        "bytes": store.nbytes,
        "last_used": store.last_used,
    }


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _age(seconds: float) -> str:
    for unit, span_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * span_s:
            return f"{seconds / span_s:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
