"""``lmcache-kit show-config``."""

from __future__ import annotations

from typing import Any, NamedTuple

import click

from lmcache_kit.cli.output import load_plugins, print_json, print_table
from lmcache_kit.config import load_config
from lmcache_kit.config.load import DEFAULT_ORIGIN, declarations
from lmcache_kit.config.plugin_keys import PluginKeys


class Row(NamedTuple):
    """A key of the configuration."""

    key: str
    value: Any
    origin: str
    meaning: str


@click.command("show-config")
@click.argument("config", type=click.Path(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show_config(config: str | None, as_json: bool) -> None:
    """Show every key, its value, the origin of the value, and the meaning of the key.

    CONFIG is a YAML file; LMCACHE_CONFIG_FILE names one otherwise. LMCACHE_<KEY> variables come on
    top, as they do in vLLM.

    \b
    Examples:
      lmcache-kit show-config
      LMCACHE_CHUNK_SIZE=64 lmcache-kit show-config examples/lookup/example.yaml
    """
    plugins = load_plugins()
    loaded = load_config(file=config, plugins=plugins)
    values = PluginKeys(plugins).without_secrets(
        loaded.config.model_dump(mode="json") | loaded.plugin_values
    )
    rows = [
        Row(
            each.name,
            values.get(each.name, each.default),
            loaded.origins.get(each.name, DEFAULT_ORIGIN),
            each.summary,
        )
        for each in declarations(plugins)
    ]
    if as_json:
        keys = {
            row.key: {"value": row.value, "origin": row.origin, "meaning": row.meaning}
            for row in rows
        }
        print_json({"keys": keys, "warnings": loaded.warnings})
        return
    print_table(Row._fields, [row._replace(value=_shown(row.value)) for row in rows])
    for warning in loaded.warnings:
        click.secho(f"Warning: {warning}", fg="yellow", err=True)


def _shown(value: object) -> str:
    """Return a value as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
