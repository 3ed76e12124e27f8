"""Take passwords out of values before they are shown.

What is hidden goes by the name of a value and by its form. Too much hidden is better than a part of
a password: signs in it that had to be escaped, and are not, move what looks like its end.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_SECRETS = frozenset(
    {
        "apikey",
        "auth",
        "credential",
        "credentials",
        "key",
        "pass",
        "passphrase",
        "passwd",
        "password",
        "pwd",
        "secret",
        "token",
    }
)
_PLACES = frozenset({"dir", "directory", "file", "folder", "path"})
_ADDRESSES = frozenset({"dsn", "endpoint", "uri", "url"})

_USER = re.compile(r"([A-Za-z][\w+.-]*:/+).*@", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*:/+")
_PLAIN = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[\w.-]*)(:\d+)?(/[\w./~+-]*)?")


def is_secret(name: str) -> bool:
    """Return whether a value of this name is a secret itself, rather than the path of a file.

    >>> is_secret("aws_secret_access_key"), is_secret("apiToken"), is_secret("max_tokens")
    (True, True, False)
    >>> is_secret("password_file")
    False
    """
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(words) and words[-1] not in _PLACES and not _SECRETS.isdisjoint(words)


def redacted(value: Any, name: str = "") -> Any:
    """Return a value with what is secret replaced: below secret names, and in URLs.

    ``name``: that of the value, or empty if it tells nothing.

    >>> redacted({"url": "redis://me:se/cret@cache.example:6379", "token": 7, "ttl_s": 60})
    {'url': 'redis://***@cache.example:6379', 'token': '***', 'ttl_s': 60}
    """
    if is_secret(name) and value is not None and value != "":
        return HIDDEN
    if isinstance(value, str):
        return _without_user(value, name)
    if isinstance(value, dict):
        return {key: redacted(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([redacted(each, name) for each in value])
    return value


def is_address(name: str) -> bool:
    """Return whether a value of this name is a URL or an address, which may hold a password."""
    words = _WORD.findall(name)
    return bool(words) and words[-1].lower().removesuffix("s") in _ADDRESSES


def _without_user(text: str, name: str) -> str:
    found = _SCHEME.match(text)
    scheme = found[0] if found else ""
    if not is_address(name) and (not scheme or scheme.startswith("file:")):
        return _USER.sub(rf"\1{HIDDEN}@", text)
    user, at, place = text.removeprefix(scheme).rpartition("@")
    place = place if _PLAIN.fullmatch(place) else HIDDEN
    return f"{scheme}{HIDDEN if at else user}{at}{place}"
