"""``lmcache-kit validate``."""

from __future__ import annotations

import click

from lmcache_kit.cli.output import load_plugins
from lmcache_kit.config import load_config
from lmcache_kit.service.mistakes import check


@click.command()
@click.argument("config", type=click.Path())
def validate(config: str) -> None:
    """Check the configuration file CONFIG by itself, without the environment.

    Every key and value is checked, and that plugins provide what it names. The exit code is 0 if
    a cache would start with it.

    \b
    Example:
      lmcache-kit validate examples/lookup/example.yaml
    """
    plugins = load_plugins()
    loaded = load_config(file=config, environ={}, plugins=plugins)
    for warning in loaded.warnings:
        click.secho(f"Warning: {warning}", fg="yellow", err=True)
    check(loaded, plugins)
    click.echo(f"{config} is valid.")
