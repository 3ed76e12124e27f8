"""Follow an event to its end: a live bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lmcache_kit.cli._events import Event, describe, describe_sizes, describe_transfer, read
from lmcache_kit.cli._rest import get
from lmcache_kit.cli.output import print_json

POLL_S = 0.2
LINE_S = 1.0
ENDED_WELL = ("done", "partial")


def follow(url: str, event_id: str, *, as_json: bool) -> None:
    """Wait for the end and print it. Exit with 1 unless all or a part was done."""
    show = _bar if Console(stderr=True).is_terminal else _lines
    try:
        (answer,) = deque(show(_poll(url, event_id)), maxlen=1)
    except KeyboardInterrupt:
        click.echo(
            f"The operation goes on; to stop it: lmcache-kit events {event_id} --cancel", err=True
        )
        raise
    event = read(Event, answer)
    if as_json:
        print_json(answer)
    else:
        click.echo(describe(event))
    if event.state not in ENDED_WELL:
        raise SystemExit(1)


def _poll(url: str, event_id: str) -> Iterator[dict[str, Any]]:
    """Ask for the event until it has ended, because REST has no way to wait for it."""
    while True:
        answer = get(f"{url}/events/{event_id}", {})
        yield answer
        if read(Event, answer).ended is not None:
            return
        time.sleep(POLL_S)


def _lines(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    shown, shown_at = "", 0.0
    for answer in answers:
        event = read(Event, answer)
        line = describe(event)
        if event.ended is None and line != shown and time.monotonic() - shown_at >= LINE_S:
            click.echo(line, err=True)
            shown, shown_at = line, time.monotonic()
        yield answer


def _bar(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} chunks {task.fields[size]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=0, size="")
        for answer in answers:
            event = read(Event, answer)
            done = event.done
            bar.update(
                task,
                description=f"{event.operation}, {event.state}",
                completed=done.chunks_done,
                total=done.chunks,
                size=describe_transfer(done.transfer) or _sizes(event),
            )
            yield answer


def _sizes(event: Event) -> str:
    """Describe how the sizes changed; empty for an operation that changes no bytes."""
    return describe_sizes(event.done) if event.ratio is not None else ""
