"""Options of the codec ``cachegen``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CacheGenOptions(BaseModel):
    """Compression level, entropy coder, profiles and threads.

    ``level``: 0 lossless, 1 near-lossless, 2 default, 3 compact. ``coder``: ``rans`` is smaller,
    ``zstd`` decodes faster. ``profiles``: files made by ``lmcache-kit cachegen profile``; the
    first one that fits a chunk encodes the chunk, all of them decode. ``threads``: number of
    threads that encode or decode one chunk.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: int = Field(default=2, ge=0, le=3)
    coder: Literal["rans", "zstd"] = "rans"
    profiles: tuple[str, ...] = ()
    threads: int = Field(default=1, ge=1, le=64)
