"""A key as it is written, and how messages show it."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

from lmcache_kit.config.redaction import without_passwords

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlevel = 2


class Entry(NamedTuple):
    """A key as it was written, its value, and its origin: ``FILE:LINE``, a variable, or vLLM's
    ``kv_connector_extra_config``."""

    key: str
    value: Any
    origin: str


def shown(entry: Entry) -> str:
    """Return key, value and origin, for a message.

    >>> shown(Entry("remote_url", "redis://me:secret@host", "x.yaml:3"))
    "remote_url: 'redis://***@host' (x.yaml:3)"
    """
    return f"{entry.key}: {shown_value(entry.value)} ({entry.origin})"


def shown_value(value: Any) -> str:
    """Return a value in short, since YAML aliases may make it endless, without passwords."""
    return _short.repr(without_passwords(value) if isinstance(value, str) else value)


def reason(message: str) -> str:
    """Return what pydantic says, without its prefix."""
    return message.removeprefix("Value error, ")
