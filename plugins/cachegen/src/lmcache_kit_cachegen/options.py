"""Options of the codec ``cachegen``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CacheGenOptions(BaseModel):
    """Options of the codec: how much to compress, and with which entropy coder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: int = Field(
        default=2,
        ge=0,
        le=3,
        description="0 lossless, 1 near-lossless, 2 default, 3 compact",
    )
    coder: Literal["rans", "zstd"] = Field(
        default="rans", description="`rans` is smaller, `zstd` decodes faster"
    )
    profiles: tuple[str, ...] = Field(
        default=(),
        description="files made by `lmcache-kit cachegen profile`; the first that fits a chunk "
        "encodes it, each of them decodes",
    )
    threads: int = Field(default=1, ge=1, le=64, description="threads for one chunk")
