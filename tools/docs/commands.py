"""The page of commands: what ``--help`` says of each."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

import click

from lmcache_kit.cli.app import app
from tools.docs.source import table

PAGE = "reference/cli.md"
HEAD = """# Commands

Every command of `lmcache-kit`, those of the kit's plugins included. `lmcache_controller` is
`lmcache-kit controller` under the name that LMCache gives it. Where a command asks the controller,
`LMCACHE_KIT_TOKEN` holds the token. An error is one line on the standard error, and exit status 1;
2 where the command line or the configuration is wrong."""


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command that does something, by the words that call it."""
    yield from _within("lmcache-kit", app, None)


def page() -> dict[str, str]:
    """Text by page."""
    parts = [HEAD]
    for words, command, context in commands():
        parts += [
            f"## `{words}` {{#{words.replace(' ', '-')}}}",
            "```text\n" + command.get_usage(context).removeprefix("Usage: ") + "\n```",
            _help(command.help or ""),
            table(("Option", "What it does"), _options(command, context)),
        ]
    return {PAGE: "\n\n".join(part for part in parts if part) + "\n"}


def _within(
    words: str, command: click.Command, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    context = click.Context(command, parent=parent, info_name=words.rpartition(" ")[2])
    context.terminal_width = 100
    if not isinstance(command, click.Group):
        yield words, command, context
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        if inner is not None:
            yield from _within(f"{words} {name}", inner, context)


def _options(command: click.Command, context: click.Context) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record and isinstance(option, click.Option) and "--help" not in option.opts:
            rows.append((f"`{record[0]}`", record[1].replace("<", "&lt;")))
    return rows


def _help(text: str) -> str:
    """Prose as it is; indented lines are commands, or a file."""
    done: list[str] = []
    for part in re.split(r"\n{2,}", inspect.cleandoc(text)):
        plain: list[str] = []
        code: list[str] = []
        for line in part.replace("\b", "").strip("\n").splitlines():
            (code if line.startswith(" ") else plain).append(line)
        done += [" ".join(plain)] if plain else []
        if code:
            body = textwrap.dedent("\n".join(code))
            kind = "yaml" if re.match(r"\w+: ", body) else "bash"
            done.append(f"```{kind}\n{body}\n```")
    return "\n\n".join(done)
