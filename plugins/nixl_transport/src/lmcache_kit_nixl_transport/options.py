"""Options of the transport ``nixl``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class NixlOptions(BaseModel):
    """Backends of NIXL and their settings.

    ``backends``: NIXL's backends by name. ``allow_tcp``: let UCX use TCP where there is neither
    RDMA nor CMA. UCX over TCP is two to three times slower than the transport ``tcp``, and a reader
    that stalls can make UCX abort the process it reads from: for experiments only.
    ``progress_delay_us``: pause of NIXL's progress thread between two polls; 0 burns a core.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backends: tuple[str, ...] = Field(default=("UCX",), min_length=1)
    allow_tcp: bool = False
    progress_delay_us: int = Field(default=1000, ge=0, le=100_000)
