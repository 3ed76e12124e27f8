"""``lmcache-kit show-config``."""

from __future__ import annotations

import click

from lmcache_kit.cli.output import print_json, print_table
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.config.redaction import without_passwords


@click.command("show-config")
@click.argument("config", type=click.Path(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show_config(config: str | None, as_json: bool) -> None:
    """Show every key, its value, where the value comes from, and what the key means.

    CONFIG is a YAML file; LMCACHE_CONFIG_FILE names one otherwise. LMCACHE_<KEY> variables come on
    top, as they do in vLLM.

    \b
    Examples:
      lmcache-kit show-config
      LMCACHE_CHUNK_SIZE=64 lmcache-kit show-config examples/lookup/example.yaml
    """
    loaded = load_config(file=config)
    values = without_passwords(loaded.config.model_dump(mode="json"))
    meanings = {key: field.description or "" for key, field in KitConfig.model_fields.items()}
    if as_json:
        keys = {
            key: {"value": value, "origin": loaded.origins[key], "meaning": meanings[key]}
            for key, value in values.items()
        }
        print_json({"keys": keys, "warnings": loaded.warnings})
        return
    rows = [(key, _shown(values[key]), loaded.origins[key], meanings[key]) for key in values]
    print_table(("key", "value", "origin", "meaning"), rows)
    for warning in loaded.warnings:
        click.secho(f"Warning: {warning}", fg="yellow", err=True)


def _shown(value: object) -> str:
    """As it would stand in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
