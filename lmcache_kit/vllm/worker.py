"""Worker role of the connector: copies KV between vLLM's pages and the cache process's memory.

A failed load follows this protocol::

    worker     reports the blocks that were not loaded, and raises ``failures`` in its metadata
    vLLM       computes those tokens again; a synchronous load's step still ran on garbage
    worker     skips all saves while the scheduler's ``failures_seen`` is lower than ``failures``
    scheduler  sees the report, plans all saves again, loads nothing more for the requests that it
               names, and raises ``failures_seen``
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.records import Located, StoreItem
from lmcache_kit.errors import CacheUnavailable
from lmcache_kit.keys import ChunkKey
from lmcache_kit.vllm.kv_pages import TransferSpec
from lmcache_kit.vllm.metadata import ConnectorMetadata, LoadSpec, SaveSpec, WorkerMetadata

if TYPE_CHECKING:
    from lmcache_kit.process.client import Grants
    from lmcache_kit.vllm.kv_pages import KVPages

_log = logging.getLogger("vllm.lmcache_kit")

MinOverRanks = Callable[[list[int]], list[int]]
"""Reduce, per load of a step, the first token that this rank could not load to the lowest over all
ranks."""


class _Damaged(CacheUnavailable):
    """A chunk does not match its checksum."""


class StoreClient(Protocol):
    """The part of :class:`~lmcache_kit.process.client.CacheClient` that a worker uses."""

    def allocate(self, namespace: bytes, chunk_size: int, items: Sequence[StoreItem]) -> Grants: ...

    def commit(self, written: Sequence[tuple[int, int]]) -> int: ...

    def abandon(self, tickets: Sequence[int]) -> None: ...

    def release(self, lease: int, *, everyone: bool = False) -> None: ...

    def report_corrupt(self, key: ChunkKey) -> None: ...

    def memory(self, incarnation: str) -> memoryview | None: ...

    @property
    def connected(self) -> bool: ...

    @property
    def incarnation(self) -> str | None: ...

    def close(self) -> None: ...


class ConnectorWorker:
    """Load and save KV of one rank. Called from its model runner's thread only.

    No failure of the cache reaches vLLM: a load that fails is reported and its tokens are computed
    instead; a save that fails is a miss later.
    """

    def __init__(
        self,
        client: StoreClient,
        *,
        rank: int,
        chunk_size: int,
        block_tokens: int,
        min_over_ranks: MinOverRanks = lambda failed: failed,
    ) -> None:
        self._client = client
        self._pages: KVPages | None = None
        self._registered_incarnation: str | None = None
        self._disabled_reason = ""
        self._rank = rank
        self._block_tokens = block_tokens
        self._chunk_size = chunk_size
        self._min_over_ranks = min_over_ranks
        self._bad_blocks: set[int] = set()
        self._finished_loads: set[str] = set()
        self._failed_requests: set[str] = set()
        self._failures = 0
        self._acknowledged = 0
        self._logged: set[str] = set()
        self.counts: Counter[str] = Counter()

    def register_kv_pages(self, pages: KVPages) -> None:
        """Load into and save from these pages from now on."""
        self._pages = pages
        incarnation = self._client.incarnation
        memory = self._client.memory(incarnation) if incarnation else None
        if incarnation and memory is not None:  # pin it now: pinning is too slow for a request
            self._register_memory(pages, incarnation, memory)

    def disable(self, reason: str) -> None:
        """Save nothing and fail all loads, since this rank's pages cannot be cached."""
        self._disabled_reason = reason

    def start_load_kv(self, metadata: ConnectorMetadata) -> None:
        """Fill the blocks of this step's loads.

        The model reads those of synchronous loads in this step. The requests of asynchronous ones
        are scheduled after :meth:`take_finished_loads` has named them.
        """
        if not metadata.loads:
            return
        loaded = self._min_over_ranks([self._load(load) for load in metadata.loads])
        for load, end in zip(metadata.loads, loaded, strict=True):
            self.counts["loaded_tokens"] += max(0, end - load.start)
            if end < load.end:
                first = max(end, load.start) // self._block_tokens
                self._bad_blocks.update(load.blocks[first:])
                self._failed_requests.add(load.request_id)
        self._finished_loads.update(load.request_id for load in metadata.loads)
        if self._bad_blocks:
            self._failures += 1

    def wait_for_save(self, metadata: ConnectorMetadata) -> None:
        """Store this step's chunks after the model has written them.

        After a failed load the model has computed this step from garbage, and with asynchronous
        scheduling the next ones too. Nothing is saved until the scheduler has acted on the failure.
        """
        self._release_stale_memory()
        self._acknowledged = metadata.failures_seen
        if metadata.failures_seen >= self._failures:
            self._failed_requests.clear()
        if metadata.failures_seen < self._failures:
            self.counts["skipped_saves"] += len(metadata.saves)
            return
        if self._pages is None:
            return
        by_namespace: defaultdict[bytes, list[SaveSpec]] = defaultdict(list)
        for save in metadata.saves:
            by_namespace[save.namespace].append(save)
        for namespace, saves in by_namespace.items():
            try:
                self._save(namespace, saves)
            # The last line of defence of a running engine: a save that fails is a miss later.
            except Exception as error:  # noqa: BLE001
                self._count_error("save", error)

    def take_block_ids_with_load_errors(self) -> set[int]:
        """Return the ids of the blocks that this step could not load, once."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_finished_loads(self) -> set[str]:
        """Return the requests whose loads have ended, well or not, once."""
        finished, self._finished_loads = self._finished_loads, set()
        return finished

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """Return the report for the scheduler; repeated until the scheduler has acted on it."""
        if self._disabled_reason or self._failures > self._acknowledged:
            return WorkerMetadata(
                self._failures, self._disabled_reason, frozenset(self._failed_requests)
            )
        return None

    def close(self) -> None:
        """Release the shared memory and close the client."""
        if self._pages is not None:
            self._pages.close()
        self._client.close()

    def _load(self, load: LoadSpec) -> int:
        """Load one request; return ``load.end``, or the first token that was not loaded."""
        at = load.start
        rest = iter(load.chunks)
        try:
            for chunk in rest:
                if chunk.end > at and at < load.end:
                    self._load_chunk(load, chunk, at)
                    at = min(chunk.end, load.end)
        # The last line of defence of a running engine: tokens that are not loaded are computed.
        except Exception as error:  # noqa: BLE001
            self._count_error("load", error)
            if isinstance(error, _Damaged):
                self._verify(load, rest)
        finally:
            self._client.release(load.lease)
        return at

    def _verify(self, load: LoadSpec, chunks: Iterator[Located]) -> None:
        """Report all chunks that are damaged, so that they do not fail one request each."""
        try:
            for chunk in chunks:
                extent = chunk.extents[self._rank]
                payload = self._view(load.incarnation, extent.offset, extent.nbytes)
                if xxh3_64_intdigest(payload) != extent.checksum:
                    self._report_corrupt(load, chunk)
        except Exception as error:  # noqa: BLE001 - the last line of defence, as above
            self._count_error("load", error)

    def _report_corrupt(self, load: LoadSpec, chunk: Located) -> None:
        self.counts["corrupt_chunks"] += 1
        if load.incarnation == self._client.incarnation:
            self._client.report_corrupt(chunk.key)

    def _load_chunk(self, load: LoadSpec, chunk: Located, at: int) -> None:
        pages = self._registered_pages()
        extent = chunk.extents[self._rank]
        if extent.nbytes != pages.layout.payload_bytes(chunk.tokens):
            raise CacheUnavailable(
                f"chunk {chunk.key.hex()} has {extent.nbytes} bytes; its {chunk.tokens} tokens "
                f"take {pages.layout.payload_bytes(chunk.tokens)}"
            )
        if not chunk.start <= at:
            raise CacheUnavailable(f"no chunk of the lookup covers tokens {at} to {chunk.start}")
        payload = self._view(load.incarnation, extent.offset, extent.nbytes)
        end = min(chunk.end, load.end)
        transfer = TransferSpec(load.blocks, at, end, payload, chunk.tokens, at - chunk.start)
        if pages.scatter(transfer) != extent.checksum:
            self._report_corrupt(load, chunk)
            raise _Damaged(f"chunk {chunk.key.hex()} does not match its checksum")

    def _save(self, namespace: bytes, saves: list[SaveSpec]) -> None:
        pages = self._registered_pages()
        items = [
            StoreItem(
                save.parent,
                save.tokens,
                pages.layout.payload_bytes(save.end - save.start),
                save.start,
            )
            for save in saves
        ]
        grants = self._client.allocate(namespace, self._chunk_size, items)
        granted = [
            (grant, save, item.nbytes)
            for grant, save, item in zip(grants, saves, items, strict=True)
            if grant.status == "granted"
        ]
        self.counts["refused_chunks"] += sum(grant.status == "refused" for grant in grants)
        if not granted:
            return
        tickets = [grant.ticket for grant, _, _ in granted]
        try:
            checksums = pages.gather(
                [
                    TransferSpec(
                        save.blocks, save.start, save.end,
                        self._view(grants.incarnation, grant.offset, nbytes), save.end - save.start,
                    )
                    for grant, save, nbytes in granted
                ]
            )  # fmt: skip
        except BaseException:
            self._client.abandon(tickets)
            raise
        if self._client.incarnation == grants.incarnation:
            self._client.commit(list(zip(tickets, checksums, strict=True)))
            self.counts["stored_tokens"] += sum(save.end - save.start for _, save, _ in granted)

    def _registered_pages(self) -> KVPages:
        if self._pages is None:
            raise CacheUnavailable(self._disabled_reason or "the KV cache is not registered yet")
        return self._pages

    def _view(self, incarnation: str, offset: int, nbytes: int) -> memoryview:
        # The view is not kept: it would keep the memory of a dead cache process from being freed.
        memory = self._client.memory(incarnation)
        if memory is None:
            raise CacheUnavailable(f"the memory of cache process {incarnation} is no longer mapped")
        if offset < 0 or offset + nbytes > len(memory):
            raise CacheUnavailable(
                f"a chunk of {nbytes} bytes at offset {offset} lies outside of the "
                f"{len(memory)} bytes of shared memory"
            )
        if self._is_current(incarnation):
            self._register_memory(self._registered_pages(), incarnation, memory)
        return memory[offset : offset + nbytes]

    def _register_memory(self, pages: KVPages, incarnation: str, memory: memoryview) -> None:
        pages.register_memory(incarnation, memory)
        self._registered_incarnation = incarnation

    def _is_current(self, incarnation: str) -> bool:
        return self._client.connected and self._client.incarnation == incarnation

    def _release_stale_memory(self) -> None:
        """Let the memory of a cache process that has ended be freed.

        The system keeps the memory while pages refer to it, and a successor may need that much.
        """
        registered = self._registered_incarnation
        if self._pages is not None and registered is not None and not self._is_current(registered):
            self._pages.close()
            self._registered_incarnation = None

    def _count_error(self, action: str, error: Exception) -> None:
        self.counts[f"{action}_errors"] += 1
        kind = f"{action}: {type(error).__name__}"
        if kind in self._logged:
            return
        self._logged.add(kind)
        known = isinstance(error, CacheUnavailable)
        _log.warning(
            "could not %s KV; serving goes on, and more errors of this kind are only counted: %s",
            action, error, exc_info=None if known else error,
        )  # fmt: skip
