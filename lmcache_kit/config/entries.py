"""A key as it is written, and how messages show it."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NamedTuple

from lmcache_kit.config.model import KEYS
from lmcache_kit.config.redaction import HIDDEN, is_secret, redacted

OPTIONS = "_options"
"""End of the keys whose values are mappings of options, or such a mapping as JSON."""


class Entry(NamedTuple):
    """A key as it was written, its value, and its origin: ``FILE:LINE``, a variable, or vLLM's
    ``kv_connector_extra_config``."""

    key: str
    value: Any
    origin: str


class _Short(reprlib.Repr):
    """Values in short, since YAML aliases may make them endless, without secrets."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel = 2

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        return super().repr_dict({key: _flat(each, str(key)) for key, each in value.items()}, level)

    def repr_str(self, value: str, level: int) -> str:
        return super().repr_str(redacted(value), level)


_short = _Short()


def shown(entry: Entry, *, secret: bool = False) -> str:
    """Return key, value and origin, for a message. ``secret``: the value is one, as a whole.

    >>> shown(Entry("remote_url", "redis://me:secret@host", "x.yaml:3"))
    "remote_url: 'redis://***@host' (x.yaml:3)"
    """
    value = HIDDEN if secret else shown_value(entry.key, entry.value)
    return f"{entry.key}: {value} ({entry.origin})"


def shown_value(key: str, value: Any) -> str:
    """Return the value of a key in short, without what is secret in it."""
    if isinstance(value, str) and key.endswith(OPTIONS):
        try:
            value = json.loads(value)
        except ValueError:
            return HIDDEN  # what is secret in it cannot be told
    # Those of the kit's keys that sound secret are paths of files.
    return _short.repr(_flat(value, "" if key in KEYS and is_secret(key) else key))


def _flat(value: Any, name: str) -> Any:
    """Return a value redacted by its name; what is in it is redacted as it is shown."""
    if isinstance(value, dict | list | tuple) and not is_secret(name):
        return value
    return redacted(value, name)


def reason(message: str) -> str:
    """Return what pydantic says, without its prefix."""
    return message.removeprefix("Value error, ")
