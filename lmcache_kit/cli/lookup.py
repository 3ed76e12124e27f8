"""``lmcache-kit lookup``."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import click

from lmcache_kit.cli.output import print_json, print_table
from lmcache_kit.errors import ControlError

DEFAULT_URL = "http://localhost:9000"
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024


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
    ids = list(tokens) if tokens else _read_tokens(file)
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
    """Instance, location, tokens and why the match stopped; LMCache's controller does not say why.

    Raises ControlError when this is no answer to a lookup.
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A controller does not redirect, and the token must not go elsewhere."""

    def redirect_request(self, *args: Any) -> None:
        return None


def post(url: str, body: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """POST JSON and return the JSON object that comes back. Raises ControlError."""
    if not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r} does not start with http:// or https://")
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("LMCACHE_KIT_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
    # A proxy that the environment names is for the world outside, not for a controller.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(request, timeout=timeout_s) as reply:
            answer = json.loads(reply.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        raise _refusal(url, error) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ControlError(
            f"no controller answers at {url}: {reason}",
            hint="Start one with 'lmcache-kit controller', or name another with --url",
        ) from error
    except ValueError as error:
        raise ControlError(f"{url} did not answer with JSON; is it a controller?") from error
    if not isinstance(answer, dict):
        raise ControlError(f"{url} did not answer with a JSON object; is it a controller?")
    return answer


def _refusal(url: str, error: urllib.error.HTTPError) -> ControlError:
    """The controller's own words, if it is ours."""
    try:
        problem = json.loads(error.read(MAX_ANSWER_BYTES))["error"]
        return ControlError(str(problem["message"]), hint=str(problem.get("hint") or ""))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ControlError(f"{url} answered with status {error.code} {error.reason}")


def _read_tokens(file: str | None) -> list[int]:
    if file is None and sys.stdin.isatty():
        raise click.UsageError("name TOKENS, or a --file, or pipe JSON into the command")
    name = "the standard input" if file in (None, "-") else str(file)
    try:
        text = sys.stdin.read() if file in (None, "-") else Path(str(file)).read_text()
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{name} holds no JSON: {error}") from error
    tokens = value.get("tokens") if isinstance(value, dict) else value
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise click.UsageError(f"{name} holds neither a list of token ids nor one under 'tokens'")
    return tokens
