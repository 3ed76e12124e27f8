"""How commands print: a table in colour on a terminal, plain columns in a pipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmcache_kit.plugins import Plugins

COLOURS = {
    "ok": "green",
    "ready": "green",
    "warn": "yellow",
    "blocked": "yellow",
    "unusable": "red",
    "duplicate": "red",
    "failed": "red",
    "fail": "bold red",
}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns.

    On a terminal empty columns are left out. In a pipe: one row a line, columns two blanks apart,
    no colours.
    """
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table(header_style="bold", box=None, pad_edge=False)
        shown = [index for index in range(len(columns)) if any(row[index] for row in rows)]
        for index in shown:
            table.add_column(columns[index], overflow="fold")
        for row in rows:
            cells = [row[index] for index in shown]
            table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in cells))
        console.print(table)
        return
    lines = [tuple(columns), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(padded).rstrip())


def print_json(value: Any) -> None:
    """Print one JSON document, indented."""
    click.echo(json.dumps(value, indent=2))


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Keep warnings of this logger back while a command gathers what it shows itself."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_plugins() -> Plugins:
    """Load all plugins. Failures are not logged: the command shows them."""
    return Plugins.load(log_failures=False)
