"""Take passwords out of values before they are shown."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"(\w+://)[^/@\s]+@")


def without_passwords(value: Any) -> Any:
    """Return the value with user and password in URLs replaced.

    >>> without_passwords({"remote_url": "redis://me:secret@cache.example:6379"})
    {'remote_url': 'redis://***@cache.example:6379'}
    """
    if isinstance(value, str):
        return _USER.sub(r"\1***@", value)
    if isinstance(value, dict):
        return {key: without_passwords(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(each) for each in value]
    return value
