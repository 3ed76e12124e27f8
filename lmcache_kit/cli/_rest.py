"""Talk to a controller over REST."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import click

from lmcache_kit.errors import ControlError

DEFAULT_URL = "http://localhost:9000"
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: a controller sends none, and the token must not go elsewhere."""

    def redirect_request(self, *args: Any) -> None:
        return None


def post(url: str, body: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """POST JSON and return the JSON object that comes back. Raises ControlError."""
    return _ask(url, json.dumps(body).encode(), timeout_s)


def get(url: str, query: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """GET with those parameters that are not None. Raises ControlError."""
    given = {key: value for key, value in query.items() if value is not None}
    return _ask(f"{url}?{urllib.parse.urlencode(given)}" if given else url, None, timeout_s)


def _ask(url: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r} does not start with http:// or https://")
    headers = {} if body is None else {"Content-Type": "application/json"}
    if token := os.environ.get("LMCACHE_KIT_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, body, headers)  # noqa: S310
    # Proxies of the environment are for other networks, not for a controller.
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
    """Build the error from the controller's reply, if it is in the controller's shape."""
    try:
        problem = json.loads(error.read(MAX_ANSWER_BYTES))["error"]
        return ControlError(str(problem["message"]), hint=str(problem.get("hint") or ""))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ControlError(f"{url} answered with status {error.code} {error.reason}")
