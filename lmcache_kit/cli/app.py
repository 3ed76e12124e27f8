"""The command ``lmcache-kit``: built-in subcommands, and those of plugins."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from lmcache_kit import __version__
from lmcache_kit.cli.output import load_plugins
from lmcache_kit.errors import KitError
from lmcache_kit.specs import Spec


class Builtin(NamedTuple):
    """A built-in subcommand: its dotted target, and its help in one line."""

    target: str
    summary: str


BUILTINS: Mapping[str, Builtin] = {
    "cache-server": Builtin("lmcache_kit.cli.cache_server:cache_server", "Run a cache process."),
    "clear": Builtin("lmcache_kit.cli.operations:clear", "Remove stored KV."),
    "compress": Builtin("lmcache_kit.cli.operations:compress", "Encode stored KV with a codec."),
    "controller": Builtin("lmcache_kit.cli.controller:controller", "Run the controller."),
    "decompress": Builtin("lmcache_kit.cli.operations:decompress", "Decode stored KV again."),
    "doctor": Builtin("lmcache_kit.cli.doctor:doctor", "Check what works on this machine."),
    "events": Builtin("lmcache_kit.cli.events:events", "Follow operations, or stop one."),
    "keys": Builtin("lmcache_kit.cli.keys:keys", "Make keys for the monitor port."),
    "lookup": Builtin("lmcache_kit.cli.lookup:lookup", "Look up which instances hold tokens."),
    "move": Builtin("lmcache_kit.cli.move:move", "Move stored KV to another instance."),
    "new-plugin": Builtin("lmcache_kit.cli.new_plugin:new_plugin", "Generate a new plugin."),
    "pin": Builtin("lmcache_kit.cli.operations:pin", "Keep stored KV from being evicted."),
    "pins": Builtin("lmcache_kit.cli.events:pins", "List pins."),
    "plugins": Builtin("lmcache_kit.cli.plugins:plugins", "List the plugins that are installed."),
    "show-config": Builtin(
        "lmcache_kit.cli.show_config:show_config", "Show every key, its value and its origin."
    ),
    "unpin": Builtin("lmcache_kit.cli.operations:unpin", "End pins."),
    "validate": Builtin("lmcache_kit.cli.validate:validate", "Check a configuration file."),
}


class PluginCommands:
    """A :class:`~lmcache_kit.interfaces.CommandContext`."""

    def options(self, name: str) -> Mapping[str, Any]:
        """Read the configuration, and return the options of one plugin in it."""
        # Deferred: most commands read no configuration.
        from lmcache_kit.config import load_config

        config = load_config(plugins=load_plugins()).config
        given = (config.backend_options, config.codec_options, config.transport_options)
        return next((options[name] for options in given if name in options), {})


class App(click.Group):
    """Imports a subcommand when it runs; an error of the kit becomes a message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*BUILTINS, *_offered()])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BUILTINS:
            return load(BUILTINS[cmd_name].target)
        if cmd_name not in _offered():
            return None
        command: click.Command = load_plugins().resolve("command", cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {name: each.summary for name, each in BUILTINS.items()}
        rows |= {name: spec.summary for name, spec in _offered().items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))

    def invoke(self, ctx: click.Context) -> Any:
        ctx.obj = PluginCommands()
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
      lmcache-kit show-config my.yaml     # every key, its value and its origin
      lmcache-kit controller --port 9000  # which instance holds which tokens, over REST
    """


def load(target: str) -> click.Command:
    """The command at ``module:attribute``."""
    module, _, attribute = target.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def run_alone(name: str, *, prog_name: str) -> None:
    """Run a subcommand as a program of its own."""
    command = load(BUILTINS[name].target)
    try:
        command(prog_name=prog_name)
    except KitError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from error


def _offered() -> dict[str, Spec]:
    """Return the subcommands of plugins. None can take the name of a built-in one."""
    offers = load_plugins().specs("command")
    return {offer.spec.name: offer.spec for offer in offers if offer.spec.name not in BUILTINS}
