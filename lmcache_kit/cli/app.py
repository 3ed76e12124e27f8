"""The command ``lmcache-kit``: its own subcommands, and those that plugins offer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from lmcache_kit import __version__
from lmcache_kit.cli.output import quiet_plugins
from lmcache_kit.errors import KitError
from lmcache_kit.specs import Spec


class Own(NamedTuple):
    """A subcommand of ours: where it lies and what it does, in a line."""

    target: str
    summary: str


OWN: Mapping[str, Own] = {
    "cache-server": Own("lmcache_kit.cli.cache_server:cache_server", "Run a cache process."),
    "clear": Own("lmcache_kit.cli.operations:clear", "Forget stored KV."),
    "compress": Own("lmcache_kit.cli.operations:compress", "Encode stored KV with a codec."),
    "controller": Own("lmcache_kit.cli.controller:controller", "Run the controller."),
    "decompress": Own("lmcache_kit.cli.operations:decompress", "Decode stored KV again."),
    "doctor": Own("lmcache_kit.cli.doctor:doctor", "Say what works on this machine."),
    "events": Own("lmcache_kit.cli.events:events", "Follow operations, or stop one."),
    "keys": Own("lmcache_kit.cli.keys:keys", "Make keys for the monitor port."),
    "lookup": Own("lmcache_kit.cli.lookup:lookup", "Ask the controller who holds some tokens."),
    "move": Own("lmcache_kit.cli.move:move", "Bring stored KV to another instance."),
    "new-plugin": Own("lmcache_kit.cli.new_plugin:new_plugin", "Make a plugin to start from."),
    "pin": Own("lmcache_kit.cli.operations:pin", "Keep stored KV from being evicted."),
    "pins": Own("lmcache_kit.cli.events:pins", "List pins."),
    "plugins": Own("lmcache_kit.cli.plugins:plugins", "List the plugins that are installed."),
    "show-config": Own(
        "lmcache_kit.cli.show_config:show_config", "Show every key, its value and its origin."
    ),
    "unpin": Own("lmcache_kit.cli.operations:unpin", "End pins."),
    "validate": Own("lmcache_kit.cli.validate:validate", "Check a configuration file."),
}


class App(click.Group):
    """Imports a subcommand when it runs; an error of the kit becomes a message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*OWN, *_offered()])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OWN:
            return load(OWN[cmd_name].target)
        if cmd_name not in _offered():
            return None
        command: click.Command = quiet_plugins().resolve("command", cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {name: own.summary for name, own in OWN.items()}
        rows |= {name: spec.summary for name, spec in _offered().items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KitError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=App, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lmcache-kit")
def app() -> None:
    """Cache, find and move the KV cache of LLM serving.

    Start with:

    \b
      lmcache-kit doctor                  # what works on this machine
      lmcache-kit show-config my.yaml     # what a configuration comes to
      lmcache-kit controller --port 9000  # who holds which tokens, over REST
    """


def load(target: str) -> click.Command:
    """The command at ``module:attribute``."""
    module, _, attribute = target.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def run_alone(name: str, *, prog_name: str) -> None:
    """Run a subcommand as a program of its own."""
    command = load(OWN[name].target)
    try:
        command(prog_name=prog_name)
    except KitError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from error


def _offered() -> dict[str, Spec]:
    """Subcommands of plugins; none of them can take one of our names."""
    offers = quiet_plugins().specs("command")
    return {offer.spec.name: offer.spec for offer in offers if offer.spec.name not in OWN}
