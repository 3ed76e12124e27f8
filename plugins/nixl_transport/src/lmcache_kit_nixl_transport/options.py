"""Options of the transport ``nixl``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class NixlOptions(BaseModel):
    """Options of the transport.

    UCX over TCP is two to three times slower than the transport ``tcp``, and a peer that stalls can
    make UCX abort the reading process: ``allow_tcp`` is for experiments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backends: tuple[str, ...] = Field(
        default=("UCX",), min_length=1, description="backends of NIXL by name"
    )
    allow_tcp: bool = Field(
        default=False,
        description="let UCX use TCP where there is neither RDMA nor CMA; for experiments",
    )
    progress_delay_us: int = Field(
        default=1000,
        ge=0,
        le=100_000,
        description="microseconds that the progress thread of NIXL sleeps between polls; 0 burns a "
        "core",
    )
