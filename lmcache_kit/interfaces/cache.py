"""Description of a cache for the hooks ``cache_opened`` and ``cache_closing``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """One incarnation of an instance's cache, and the names of its locations."""

    instance_id: str
    incarnation: str
    locations: tuple[str, ...]
