"""``lmcache-kit validate``."""

from __future__ import annotations

import click

from lmcache_kit.cli.output import load_plugins
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.plugins import Plugins
from lmcache_kit.service.build import backend_factory, memory_factory
from lmcache_kit.service.codecs import Codecs
from lmcache_kit.service.service import worker_keys


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
    check_names(loaded.config, plugins)
    worker_keys(loaded.config)
    click.echo(f"{config} is valid.")


def check_names(config: KitConfig, plugins: Plugins) -> None:
    """Raises ConfigError or PluginError for a name that no usable plugin provides."""
    memory_factory(config, plugins)
    for name, options in config.lower_tiers.items():
        backend_factory(plugins, name, options)
    plugins.eviction_policy(config.cache_policy)
    if config.store_codec:
        Codecs(plugins, config.codec_options).make(config.store_codec)
