"""``lmcache-kit lookup``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from lmcache_kit.cli._rest import DEFAULT_URL, post
from lmcache_kit.cli._tokens import given_tokens
from lmcache_kit.cli.output import print_json, print_table
from lmcache_kit.errors import ControlError


@click.command()
@click.argument("tokens", type=int, nargs=-1)
@click.option("--file", "file", type=click.Path(), help="Read tokens from JSON; - is the input.")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The controller.")
@click.option("--model", help="Only KV of this model.")
@click.option("--cache-salt", help="KV of requests with this salt.")
@click.option("--instance", "instance_id", help="Only this instance.")
@click.option("--json", "as_json", is_flag=True, help="Print the controller's answer.")
def lookup(
    tokens: tuple[int, ...], file: str | None, url: str, as_json: bool, **filters: str | None
) -> None:
    """Ask the controller which instances hold the KV of these tokens, and of how many.

    TOKENS are ids. JSON, from --file or the standard input, is a list of ids or an object with
    "tokens", such as vLLM's answer to /tokenize. LMCACHE_KIT_TOKEN holds the controller's token
    if it asks for one.

    \b
    Examples:
      lmcache-kit lookup 128000 849 21435
      curl -s http://localhost:8000/tokenize -H 'Content-Type: application/json' \\
          -d '{"model": "M", "prompt": "Hello"}' | lmcache-kit lookup
    """
    body = {key: value for key, value in filters.items() if value is not None}
    ids = given_tokens(tokens, file)
    answer = post(
        f"{url.rstrip('/')}/lookup",
        {"tokens": ids, **({} if as_json else {"detail": True}), **body},
    )
    if as_json:
        print_json(answer)
        return
    rows = [(*where, f"{count} of {len(ids)}", why) for *where, count, why in _matches(answer)]
    if rows:
        print_table(("instance", "location", "tokens", "stopped"), rows)
    else:
        click.echo("No instance holds KV of these tokens.")


def _matches(answer: Mapping[str, Any]) -> Iterator[tuple[str, str, int, str]]:
    """Iterate over instance, location, tokens and why the match stopped.

    LMCache's controller does not tell why. Raise ControlError for any other reply.
    """
    try:
        if "detail" not in answer:
            for instance, (location, count) in answer["layout_info"].items():
                yield instance, location, count, ""
        for instance, locations in answer.get("detail", {}).items():
            for at in locations:
                yield instance, at["location"], at["tokens"], at["stopped"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ControlError("what answered is no controller: its answer has no matches") from error
