"""JSON over HTTP, with the standard library's client."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from tests.support.waiting import DEADLINE_S


def ask(url: str, body: object = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """Return status and document of the answer; a ``body`` makes it a POST.

    Bytes are sent as they are, anything else as JSON.
    """
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def get_text(url: str) -> str:
    """Return the text at an address that must answer with 200."""
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as reply:
        text: str = reply.read().decode()
    return text
