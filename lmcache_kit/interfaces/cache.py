"""What plugins learn about a cache that opens or closes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """One life of a cache: whose it is, which life, and where it keeps things."""

    instance_id: str
    incarnation: str
    locations: tuple[str, ...]
