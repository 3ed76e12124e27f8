"""``lmcache-kit doctor``."""

from __future__ import annotations

from dataclasses import asdict

import click

from lmcache_kit.cli import checks
from lmcache_kit.cli.output import load_plugins, print_json, print_table
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.errors import ConfigError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def doctor(as_json: bool) -> None:
    """Try what a start will try on this machine, with a remedy for what does not work.

    The configuration is read from LMCACHE_CONFIG_FILE and LMCACHE_*. The exit code is 1 if
    something that is configured does not work. A mistake in the configuration ends vLLM's start;
    without a tier, or without memory for the cache, vLLM serves all the same, and logs an error.

    \b
    Examples:
      lmcache-kit doctor
      LMCACHE_CONFIG_FILE=examples/lookup/example.yaml lmcache-kit doctor --json
    """
    results = _all_checks()
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        rows = [(each.state, each.name, each.detail, each.remedy) for each in results]
        print_table(("state", "what", "found", "what to do"), rows)
    if any(result.state == "fail" for result in results):
        raise SystemExit(1)


def _all_checks() -> list[checks.Check]:
    plugins = load_plugins()
    try:
        loaded = load_config(plugins=plugins)
    except ConfigError as error:
        config = KitConfig()
        configured = [checks.Check.failed("configuration", error)]
    else:
        config = loaded.config
        configured = list(checks.configuration(loaded))
    now = checks.running(config)
    return [
        *checks.kit(),
        *configured,
        *checks.plugins(plugins, config, now),
        *checks.shared_memory(),
        *checks.memory(plugins, config, now),
        *checks.runtime_directory(config, now),
        *checks.keys(config),
        *checks.vllm(),
        *checks.connectors(),
        *checks.gpu(),
        *checks.controller(config),
        *checks.peers(plugins, config, now),
    ]
