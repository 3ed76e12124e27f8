"""Who may call."""

from __future__ import annotations

import hmac

from aiohttp import hdrs, web

from lmcache_kit_http_api.options import HttpOptions
from lmcache_kit_http_api.problems import ApiError

_HINT = "Send the header 'Authorization: Bearer <token>'"


def admit(request: web.BaseRequest, options: HttpOptions) -> None:
    """Raises ApiError 401 without the token that is asked for, 403 with a wrong one.

    Without a configured token only programs may call: a page in a browser on this machine could
    otherwise reach a loopback address on behalf of whoever wrote the page.
    """
    if options.token is None:
        if hdrs.ORIGIN in request.headers:
            raise ApiError(
                403,
                "cross_origin",
                "requests from web pages are not answered without a token",
                hint="Start the controller with a token, or call from outside a browser",
            )
        return
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise ApiError(
            401,
            "token_missing",
            "this controller asks for a token",
            hint=_HINT,
            headers={hdrs.WWW_AUTHENTICATE: 'Bearer realm="lmcache-kit"'},
        )
    expected = options.token.get_secret_value().encode()
    if not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), expected):
        raise ApiError(403, "token_wrong", "the token is not the right one", hint=_HINT)
