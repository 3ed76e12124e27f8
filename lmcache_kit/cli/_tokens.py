"""Token ids on the command line, in a file, or on the standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


def given_tokens(tokens: tuple[int, ...], file: str | None) -> list[int]:
    """``tokens``, or those of the JSON in ``file``; "-" and None are the standard input."""
    if tokens and file is not None:
        raise click.UsageError("name TOKENS or a --file, not both")
    return list(tokens) if tokens else _read(file)


def tokens_or_all(tokens: tuple[int, ...], file: str | None, everything: bool) -> list[int] | None:
    """None for everything, which must be asked for by name."""
    if not everything:
        found = given_tokens(tokens, file)
        if not found:
            raise click.UsageError("there are no tokens; everything is --all")
        return found
    if tokens or file is not None:
        raise click.UsageError("name tokens or --all, not both")
    return None


def _read(file: str | None) -> list[int]:
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
