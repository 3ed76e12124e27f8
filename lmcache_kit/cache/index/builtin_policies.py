"""The kit's own eviction policies, offered as a plugin offers its own.

Asked last, so that a plugin may replace any of them by name.
"""

from __future__ import annotations

from collections.abc import Callable

from lmcache_kit.cache.index.policies import FIFO, LFU, LRU
from lmcache_kit.hookspecs import hookimpl
from lmcache_kit.interfaces import EvictionPolicy

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"LRU": LRU, "FIFO": FIFO, "LFU": LFU}


@hookimpl(trylast=True)
def make_eviction_policy(name: str) -> EvictionPolicy | None:
    """Make a policy by its name, in any case."""
    make = POLICIES.get(name.upper())
    return make() if make else None
