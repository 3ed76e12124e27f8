"""Options of the transport."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class NixlOptions(BaseModel):
    """What NIXL runs on.

    ``backends``: NIXL's backends by name. ``allow_tcp``: let UCX move bytes by TCP where there is
    neither RDMA nor CMA. It is two to three times slower than the transport ``tcp``, and a peer
    that stalls can make UCX abort the process that it reads from: for experiments.
    ``progress_delay_us``: how long NIXL's progress thread sleeps between two looks; 0 burns a core.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backends: tuple[str, ...] = Field(default=("UCX",), min_length=1)
    allow_tcp: bool = False
    progress_delay_us: int = Field(default=1000, ge=0, le=100_000)
