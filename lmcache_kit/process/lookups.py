"""Run lookups on the server's event loop without blocking it, however long decoding takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.records import Match
    from lmcache_kit.protocol.local import Lookup


def look_up(
    engine: CacheEngine, request: Lookup, owner: Hashable, answer_later: Callable[[Match], None]
) -> Match | None:
    """Return the match at once, or None when chunks must be promoted or decoded first.

    Then ``answer_later`` is called with it, on this loop: when all chunks are ready, or after
    ``request.wait_s`` seconds, with those that are.
    """
    loop = asyncio.get_running_loop()
    search = engine.begin_lookup(
        request.namespace,
        request.tokens,
        request.chunk_size,
        request.world_size,
        owner,
        lambda: soon(loop, finish),
    )
    if not search.waiting or not request.wait_s:
        return engine.finish_lookup(search)
    timer: asyncio.TimerHandle | None = None

    def finish() -> None:
        nonlocal timer
        if timer:  # the first of the two calls
            timer.cancel()
            timer = None
            answer_later(engine.finish_lookup(search))

    timer = loop.call_later(request.wait_s, finish)
    return None


def soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Schedule ``call`` on the loop, from any thread; without effect once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
