"""``lmcache-kit events`` and ``pins``."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from lmcache_kit.cli._events import Event, Pin, read, shown_bytes
from lmcache_kit.cli._follow import follow
from lmcache_kit.cli._rest import DEFAULT_URL, get, post
from lmcache_kit.cli.output import print_json, print_table


class _Events(msgspec.Struct, frozen=True):
    events: list[Event]


class _Pins(msgspec.Struct, frozen=True):
    pins: list[Pin]
    unanswered: list[str]


_COLUMNS = ("event", "operation", "instance", "location", "state", "tokens", "chunks", "ratio",
            "begun", "message")  # fmt: skip


@click.command()
@click.argument("event_id", required=False)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The controller.")
@click.option("--wait", is_flag=True, help="Show its progress, and wait for its end.")
@click.option("--cancel", is_flag=True, help="Stop it; what is done stays done.")
@click.option("--state", help="Only those in this state, such as running.")
@click.option("--operation", help="Only these, such as move.")
@click.option("--instance", "instance_id", help="Those of this instance; moves by either end.")
@click.option("--limit", type=int, help="The latest so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the controller's answer.")
def events(
    event_id: str | None, url: str, wait: bool, cancel: bool, as_json: bool, **filters: Any
) -> None:
    """List operations, the latest first, or follow the one with EVENT_ID.

    \b
    Examples:
      lmcache-kit events --state running
      lmcache-kit events 0d5f3c... --wait
      lmcache-kit events 0d5f3c... --cancel
    """
    url = url.rstrip("/")
    if event_id is None:
        if wait or cancel:
            raise click.UsageError("--wait and --cancel need an EVENT_ID")
        answer = get(f"{url}/events", filters)
        _show(answer, [] if as_json else read(_Events, answer).events, as_json=as_json)
        return
    if any(value is not None for value in filters.values()):
        raise click.UsageError("an EVENT_ID needs no filter")
    if not _is_id(event_id):
        raise click.BadParameter(f"{event_id!r} is no event id")
    if cancel:
        post(f"{url}/events/{event_id}/cancel", {})
    if wait:
        follow(url, event_id, as_json=as_json)
        return
    answer = get(f"{url}/events/{event_id}", {})
    _show(answer, [] if as_json else [read(Event, answer)], as_json=as_json)


@click.command()
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The controller.")
@click.option("--instance", "instance_id", help="Only those of this instance.")
@click.option("--location", help="Only those at this location.")
@click.option("--json", "as_json", is_flag=True, help="Print the controller's answer.")
def pins(url: str, as_json: bool, **filters: Any) -> None:
    """List pins, and how long they last.

    \b
    Example:
      lmcache-kit pins --instance lmcache_default_instance
    """
    answer = get(f"{url.rstrip('/')}/pins", filters)
    if as_json:
        print_json(answer)
        return
    found = read(_Pins, answer)
    rows = [_pin(each) for each in found.pins]
    if rows:
        columns = ("pin", "instance", "location", "tokens", "bytes", "owner", "expires in")
        print_table(columns, rows)
    else:
        click.echo("There are no pins.")
    for name in found.unanswered:
        click.echo(f"Instance {name} did not answer.", err=True)


def _show(answer: dict[str, Any], found: list[Event], *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    elif found:
        print_table(_COLUMNS, [_event(each) for each in found])
    else:
        click.echo("There are no events.")


def _event(event: Event) -> tuple[str, ...]:
    done = event.done
    return (
        event.event_id,
        event.operation,
        _from_to(event.old_position and event.old_position[0], event.instance_id),
        _from_to(event.old_position and event.old_position[1], event.location),
        event.state,
        str(event.num_tokens),
        f"{done.chunks_done}/{done.chunks}",
        "-" if event.ratio is None else f"{event.ratio:.2f}",
        time.strftime("%H:%M:%S", time.localtime(event.created)),
        event.message,
    )


def _from_to(source: str | None, name: str) -> str:
    """Show both ends of a move where they differ."""
    return name if source in (None, name) else f"{source} -> {name}"


def _pin(pin: Pin) -> tuple[str, ...]:
    return (
        pin.pin_id,
        pin.instance_id,
        pin.location,
        str(pin.num_tokens),
        shown_bytes(pin.bytes),
        pin.owner or "-",
        "never" if pin.expires_in_s is None else f"{pin.expires_in_s:.0f} s",
    )


def _is_id(text: str) -> bool:
    """Whether a text can be an id and a part of a URL."""
    return text.replace("-", "").replace("_", "").isalnum() and text.isascii()
