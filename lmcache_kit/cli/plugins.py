"""``lmcache-kit plugins``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import click

from lmcache_kit.cli.output import load_plugins, print_json, print_table
from lmcache_kit.first_party import (
    DEFAULT_FRONTEND,
    DEFAULT_MEMORY_BACKEND,
    distribution_of,
)
from lmcache_kit.plugins import Plugins
from lmcache_kit.specs import KINDS

COLUMNS = ("name", "kind", "version", "distribution", "path", "state", "failure")


@dataclass(frozen=True)
class Row:
    """An offer of a plugin, a plugin without offers, or a failure."""

    name: str
    kind: str
    version: str
    distribution: str
    path: str
    state: str
    failure: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def plugins(as_json: bool) -> None:
    """List the offers of installed plugins, and the failures.

    LMCACHE_KIT_PLUGINS selects plugins: "a,b" allows only these, "-a" blocks one.

    \b
    Examples:
      lmcache-kit plugins
      LMCACHE_KIT_PLUGINS=-http_api lmcache-kit plugins --json
    """
    rows = list(_rows(load_plugins()))
    if as_json:
        print_json([asdict(row) for row in rows])
    elif rows:
        print_table(COLUMNS, [tuple(asdict(row).values()) for row in rows])
    else:
        memory = distribution_of("backend", DEFAULT_MEMORY_BACKEND)
        rest = distribution_of("frontend", DEFAULT_FRONTEND)
        wanted = f"pip install {memory} {rest}"
        click.echo(f"No plugins are installed. To store KV and to serve REST: {wanted}")


def _rows(found: Plugins) -> Iterator[Row]:
    silent = {info.name: info for info in found.loaded}
    for kind in KINDS:
        for offer in found.specs(kind):
            info = offer.plugin
            silent.pop(info.name, None)
            why_not = found.why_unusable(offer)
            state = "unusable" if why_not else "ready"
            yield Row(
                offer.spec.name, kind, info.version, info.distribution, info.path, state, why_not
            )
    for info in silent.values():
        yield Row(info.name, "hooks", info.version, info.distribution, info.path, "ready")
    for info in found.blocked:
        yield Row(info.name, "plugin", info.version, info.distribution, info.path, "blocked")
    for failure in found.failures:
        error = f"{failure.stage}: {failure.error}"
        yield Row(failure.plugin, "plugin", "", failure.distribution, "", "failed", error)
