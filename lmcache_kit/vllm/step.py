"""What the scheduler's side tells the workers' side in each step, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache_kit.cache.records import Located
from lmcache_kit.keys import ChunkKey


class Load(NamedTuple):
    """Read tokens ``[start, end)`` of a request from leased chunks into its ``blocks``."""

    request_id: str
    lease: int
    incarnation: str
    chunks: tuple[Located, ...]
    start: int
    end: int
    blocks: list[int]


class Save(NamedTuple):
    """Store tokens ``[start, end)`` of the sequence in ``blocks``: one chunk."""

    request_id: str
    namespace: bytes
    parent: ChunkKey
    tokens: bytes
    start: int
    end: int
    blocks: list[int]


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]  # vllm is not type-checked
    """Work of one step.

    ``tails``: requests whose blocks vLLM keeps until the worker has reported them as saved.
    ``failures_seen``: the highest :class:`Report` that the scheduler has acted on.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    tails: set[str] = field(default_factory=set)
    failures_seen: int = 0


@dataclass
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vllm is not type-checked
    """``failures``: steps with failed loads so far. ``passive``: why a worker gave up."""

    failures: int
    passive: str = ""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        assert isinstance(other, Report)
        return Report(max(self.failures, other.failures), self.passive or other.passive)
