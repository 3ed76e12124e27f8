"""``lmcache-kit cache-server``."""

from __future__ import annotations

import logging
from contextlib import closing

import click

from lmcache_kit.cli.output import print_json, print_table, silenced
from lmcache_kit.config import KitConfig, load_config
from lmcache_kit.process.paths import socket_path

STATUS_TIMEOUT_S = 2.0


@click.command("cache-server")
@click.option(
    "--config", "config_file", type=click.Path(), help="YAML file; LMCACHE_* come on top."
)
@click.option("--status", is_flag=True, help="Show the figures of the one that runs.")
@click.option("--json", "as_json", is_flag=True, help="With --status: print one JSON document.")
def cache_server(config_file: str | None, status: bool, as_json: bool) -> None:
    """Run an instance's cache process until Ctrl-C or SIGTERM, for a service manager.

    vLLM then connects to it with "cache_process: attach" and the same lmcache_instance_id.

    \b
    Examples:
      lmcache-kit cache-server --config examples/lookup/example.yaml
      lmcache-kit cache-server --config examples/lookup/example.yaml --status
    """
    loaded = load_config(file=config_file)
    for warning in loaded.warnings:
        click.secho(f"Warning: {warning}", fg="yellow", err=True)
    if status or as_json:
        _show_status(loaded.config, as_json=as_json)
    else:
        _serve(loaded.config)


def _serve(config: KitConfig) -> None:
    from lmcache_kit.service.service import serve

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    path = socket_path(config)

    def ready() -> None:
        click.echo(f"cache-server: instance {config.lmcache_instance_id!r} at {path}; Ctrl-C stops")

    serve(config, socket=path, linger_s=None, on_ready=ready)


def _show_status(config: KitConfig, *, as_json: bool) -> None:
    from lmcache_kit.service.launch import open_client

    attached = config.model_copy(update={"cache_process": "attach"})
    with silenced("lmcache_kit"), closing(open_client(attached, role="tool")) as client:
        client.wait_ready(STATUS_TIMEOUT_S)
        stats = client.stats()
    about = {
        "instance_id": stats.instance_id,
        "pid": stats.pid,
        "location": stats.location,
        "incarnation": stats.incarnation,
    }
    models = [
        {
            "model": each.model,
            "weights": each.weights,
            "config": each.config,
            "generation": each.generation,
            "namespace": each.digest.hex(),
        }
        for each in stats.namespaces
    ]
    if as_json:
        figures = {"values": stats.values, "lower_tiers": stats.lower_tiers}
        print_json({**about, "models": models, **figures})
        return
    rows = [(name, "", str(value)) for name, value in about.items()]
    rows += [(name, "", value) for model in models for name, value in model.items() if value]
    rows += [
        (name, location, f"{value:.12g}")
        for location, values in {"": stats.values, **stats.lower_tiers}.items()
        for name, value in sorted(values.items())
    ]
    print_table(("name", "location", "value"), rows)
