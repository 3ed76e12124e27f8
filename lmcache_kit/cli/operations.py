"""``lmcache-kit pin``, ``unpin``, ``clear``, ``compress`` and ``decompress``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from lmcache_kit.cli._follow import follow
from lmcache_kit.cli._rest import DEFAULT_URL, post
from lmcache_kit.cli._tokens import given_tokens, tokens_or_all
from lmcache_kit.cli.output import print_json
from lmcache_kit.config.model import DEFAULT_INSTANCE
from lmcache_kit.errors import ControlError
from lmcache_kit.first_party import DEFAULT_CODEC, DEFAULT_MEMORY_BACKEND

_ANSWER_S = 40.0

_C = TypeVar("_C", bound=Callable[..., Any])

_SHARED = (
    click.argument("tokens", type=int, nargs=-1),
    click.option(
        "--file", "file", type=click.Path(), help="Read tokens from JSON; - is the input."
    ),
    click.option("--url", default=DEFAULT_URL, show_default=True, help="The controller."),
    click.option("--model", help="Only KV of this model."),
    click.option("--cache-salt", help="KV of requests with this salt."),
    click.option("--deadline", "deadline_s", type=float, help="Give up after so many seconds."),
    click.option("--idempotency-key", help="Give it again with the same key: it is done once."),
    click.option("--json", "as_json", is_flag=True, help="Print the controller's answer."),
)
_PLACE = (
    click.option("--instance", "instance_id", default=DEFAULT_INSTANCE, show_default=True),
    click.option("--location", default=DEFAULT_MEMORY_BACKEND, show_default=True),
)
everything_option = click.option("--all", "everything", is_flag=True, help="All at that location.")
wait_option = click.option("--wait", is_flag=True, help="Show its progress, and wait for its end.")
_method = click.option("--method", default=DEFAULT_CODEC, show_default=True, help="The codec.")


def shared(command: _C) -> _C:
    """Add the options that all operations take."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


def at_place(command: _C) -> _C:
    """Add the options that name an instance and a location."""
    for option in reversed(_PLACE):
        command = option(command)
    return command


@click.command()
@at_place
@shared
@click.option("--ttl", "ttl_s", type=float, help="Keep it for so many seconds.")
@click.option("--owner", help="Shown by `lmcache-kit pins`.")
def pin(tokens: tuple[int, ...], file: str | None, **options: Any) -> None:
    """Keep what is stored of these tokens, whatever else is evicted.

    TOKENS are ids, given as to `lmcache-kit lookup`.

    \b
    Example:
      lmcache-kit pin 128000 849 21435 --ttl 3600
    """
    submit("pin", "Pinned", given_tokens(tokens, file), options)


@click.command()
@at_place
@shared
@click.option("--pin", "pin_id", help="This pin: the event it was made by.")
def unpin(tokens: tuple[int, ...], file: str | None, **options: Any) -> None:
    """End the pins within these tokens, or one pin.

    \b
    Examples:
      lmcache-kit unpin 128000 849 21435
      lmcache-kit unpin --pin 0d5f3c...
    """
    by_name = options["pin_id"] is not None and not tokens and file is None
    submit("unpin", "Unpinned", None if by_name else given_tokens(tokens, file), options)


@click.command()
@at_place
@shared
@everything_option
@click.option("--force", is_flag=True, default=None, help="Pinned KV as well.")
def clear(tokens: tuple[int, ...], file: str | None, everything: bool, **options: Any) -> None:
    """Delete what is stored of these tokens and what follows them, or everything.

    \b
    Examples:
      lmcache-kit clear 128000 849 21435
      lmcache-kit clear --all
    """
    submit("clear", "Cleared", tokens_or_all(tokens, file, everything), options)


@click.command()
@at_place
@shared
@everything_option
@_method
@wait_option
def compress(
    tokens: tuple[int, ...], file: str | None, everything: bool, wait: bool, **options: Any
) -> None:
    """Encode what is stored of these tokens, or everything. It is found and served as before.

    \b
    Examples:
      lmcache-kit compress 128000 849 21435
      lmcache-kit compress --all --wait
    """
    submit("compress", "Compressing", tokens_or_all(tokens, file, everything), options, wait=wait)


@click.command()
@at_place
@shared
@everything_option
@_method
@wait_option
def decompress(
    tokens: tuple[int, ...], file: str | None, everything: bool, wait: bool, **options: Any
) -> None:
    """Decode what is stored of these tokens, or everything.

    \b
    Example:
      lmcache-kit decompress --all --wait
    """
    submit(
        "decompress", "Decompressing", tokens_or_all(tokens, file, everything), options, wait=wait
    )


def submit(
    verb: str,
    word: str,
    tokens: list[int] | None,
    options: Mapping[str, Any],
    *,
    wait: bool | None = None,
) -> None:
    """POST a request with these options, and print the answer, which begins with ``word``.

    ``wait`` is None for an operation that has ended when the answer comes.
    """
    given = dict(options)
    url, as_json = given.pop("url").rstrip("/"), given.pop("as_json")
    body = {key: value for key, value in given.items() if value is not None}
    if tokens is not None:
        body["tokens"] = tokens
    answer = post(f"{url}/{verb}", body, timeout_s=_ANSWER_S)
    try:
        event_id, num_tokens = str(answer["event_id"]), int(answer["num_tokens"])
    except (LookupError, TypeError, ValueError) as error:
        raise ControlError("what answered is no controller: its answer names no event") from error
    if wait:
        follow(url, event_id, as_json=as_json)
        return
    if as_json:
        print_json(answer)
        return
    asked = f" of {len(tokens)}" if verb == "pin" and tokens is not None else ""
    noun = "token" if num_tokens == 1 and not asked else "tokens"
    click.echo(f"{word} {num_tokens}{asked} {noun} (event {event_id})")
    if answer.get("message"):
        click.echo(str(answer["message"]))
    if wait is False:
        click.echo(f"Follow it with: lmcache-kit events {event_id} --wait")
