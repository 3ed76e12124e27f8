"""Metadata that the connector's scheduler and workers exchange in each step.

``ConnectorMetadata`` goes from the scheduler to every worker, ``WorkerMetadata`` comes back. vLLM
pickles both between its processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache_kit.cache.records import Located
from lmcache_kit.keys import ChunkKey


class LoadSpec(NamedTuple):
    """Load tokens ``[start, end)`` of a request from leased chunks into its ``blocks``.

    ``incarnation`` names the cache process whose memory holds the ``chunks``.
    """

    request_id: str
    lease: int
    incarnation: str
    chunks: tuple[Located, ...]
    start: int
    end: int
    blocks: list[int]


class SaveSpec(NamedTuple):
    """Save one chunk: tokens ``[start, end)`` of the sequence in ``blocks``.

    ``namespace`` is a digest, ``parent`` the key of the chunk before, ``tokens`` are packed.
    """

    request_id: str
    namespace: bytes
    parent: ChunkKey
    tokens: bytes
    start: int
    end: int
    blocks: list[int]


@dataclass
class ConnectorMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not type-checked
    """Loads and saves of one step.

    ``free_after_save``: finished requests whose blocks vLLM frees once a worker has saved them.
    ``failures_seen``: the highest ``WorkerMetadata.failures`` that the scheduler has acted on.
    """

    loads: list[LoadSpec] = field(default_factory=list)
    saves: list[SaveSpec] = field(default_factory=list)
    free_after_save: set[str] = field(default_factory=set)
    failures_seen: int = 0


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vllm is not type-checked
    """Report of one worker, aggregated over all ranks to the worst.

    ``failures`` counts the steps with failed loads so far, and ``failed_requests`` are those whose
    loads have failed since the scheduler has acted on any. ``disabled_reason`` says why the worker
    cannot cache this model's KV; empty while it can.
    """

    failures: int
    disabled_reason: str = ""
    failed_requests: frozenset[str] = frozenset()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(
            max(self.failures, other.failures),
            self.disabled_reason or other.disabled_reason,
            self.failed_requests | other.failed_requests,
        )
