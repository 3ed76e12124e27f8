"""The connector's worker side: KV between vLLM's pages and the cache process's memory."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from lmcache_kit.cache.records import Located, StoreItem
from lmcache_kit.errors import CacheUnavailable
from lmcache_kit.keys import ChunkKey
from lmcache_kit.vllm.pages import Piece
from lmcache_kit.vllm.step import Load, Report, Save, Step

if TYPE_CHECKING:
    from lmcache_kit.process.client import Grants
    from lmcache_kit.vllm.pages import Pages

_log = logging.getLogger("vllm.lmcache_kit")

Agree = Callable[[list[int]], list[int]]
"""Takes, per load of a step, the first token that this rank could not load, and returns the lowest
over all ranks."""


class StoreClient(Protocol):
    """What the workers' side needs of a :class:`~lmcache_kit.process.client.CacheClient`."""

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


class WorkerSide:
    """One per rank. Called from its model runner's thread.

    Nothing that goes wrong with the cache reaches vLLM: a load that fails is reported as such and
    computed instead, a save that fails is a miss later.
    """

    def __init__(
        self,
        client: StoreClient,
        *,
        rank: int,
        chunk_size: int,
        block_tokens: int,
        agree: Agree = lambda failed: failed,
    ) -> None:
        self._client = client
        self._pages: Pages | None = None
        self._in_use: str | None = None
        self._passive = ""
        self._rank = rank
        self._block_tokens = block_tokens
        self._chunk_size = chunk_size
        self._agree = agree
        self._bad_blocks: set[int] = set()
        self._failures = 0
        self._acknowledged = 0
        self._logged: set[str] = set()
        self.counts: Counter[str] = Counter()

    def serve(self, pages: Pages) -> None:
        """Begin to move KV between these pages and the cache."""
        self._pages = pages
        incarnation = self._client.incarnation
        memory = self._client.memory(incarnation) if incarnation else None
        if incarnation and memory is not None:  # pinning it takes a while: not in a request's time
            self._use(pages, incarnation, memory)

    def refuse(self, reason: str) -> None:
        """These pages cannot be served: nothing will be stored, and loads fail."""
        self._passive = reason

    def load(self, step: Step) -> None:
        """Fill the blocks of this step's loads, before the model reads them."""
        if not step.loads:
            return
        loaded = self._agree([self._load(load) for load in step.loads])
        for load, end in zip(step.loads, loaded, strict=True):
            self.counts["loaded_tokens"] += max(0, end - load.start)
            if end < load.end:
                first = max(end, load.start) // self._block_tokens
                self._bad_blocks.update(load.blocks[first:])
        if self._bad_blocks:
            self._failures += 1

    def save(self, step: Step) -> None:
        """Store this step's chunks, after the model has written them.

        After a failed load the model has computed this step, and with asynchronous scheduling the
        next ones, from garbage: nothing is saved until the scheduler has acted on the failure.
        """
        self._let_go_of_the_dead()
        self._acknowledged = step.failures_seen
        if step.failures_seen < self._failures:
            self.counts["skipped_saves"] += len(step.saves)
            return
        if self._pages is None:
            return
        by_namespace: defaultdict[bytes, list[Save]] = defaultdict(list)
        for save in step.saves:
            by_namespace[save.namespace].append(save)
        for namespace, saves in by_namespace.items():
            try:
                self._save(namespace, saves)
            # The last line of defence of a running engine: a save that fails is only a miss.
            except Exception as error:  # noqa: BLE001
                self._count_error("save", error)

    def take_bad_blocks(self) -> set[int]:
        """Blocks that this step could not load."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def report(self) -> Report | None:
        """For the scheduler: repeated until it has answered."""
        if self._passive or self._failures > self._acknowledged:
            return Report(self._failures, self._passive)
        return None

    def close(self) -> None:
        """Give everything back."""
        if self._pages is not None:
            self._pages.close()
        self._client.close()

    def _load(self, load: Load) -> int:
        """Returns how far it got: ``load.end``, or the first token that it could not load."""
        at = load.start
        try:
            for chunk in load.chunks:
                if chunk.end > at and at < load.end:
                    self._load_chunk(load, chunk, at)
                    at = min(chunk.end, load.end)
        # The last line of defence of a running engine: what cannot be loaded is computed.
        except Exception as error:  # noqa: BLE001
            self._count_error("load", error)
        finally:
            self._client.release(load.lease)
        return at

    def _load_chunk(self, load: Load, chunk: Located, at: int) -> None:
        pages = self._serving()
        extent = chunk.extents[self._rank]
        if extent.nbytes != pages.layout.payload_bytes(chunk.tokens):
            raise CacheUnavailable(f"a stored chunk has {extent.nbytes} bytes, which do not fit")
        if not chunk.start <= at:
            raise CacheUnavailable("a lookup's chunks leave a gap")
        payload = self._at(load.incarnation, extent.offset, extent.nbytes)
        end = min(chunk.end, load.end)
        piece = Piece(load.blocks, at, end, payload, chunk.tokens, at - chunk.start)
        if pages.scatter(piece) != extent.checksum:
            self.counts["corrupt_chunks"] += 1
            if load.incarnation == self._client.incarnation:
                self._client.report_corrupt(chunk.key)
            raise CacheUnavailable("a stored chunk does not match its checksum")

    def _save(self, namespace: bytes, saves: list[Save]) -> None:
        pages = self._serving()
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
                    Piece(
                        save.blocks, save.start, save.end,
                        self._at(grants.incarnation, grant.offset, nbytes), save.end - save.start,
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

    def _serving(self) -> Pages:
        if self._pages is None:
            raise CacheUnavailable(self._passive or "the KV cache is not registered yet")
        return self._pages

    def _at(self, incarnation: str, offset: int, nbytes: int) -> memoryview:
        # Not kept: a view keeps the memory of a dead cache process from being freed.
        memory = self._client.memory(incarnation)
        if memory is None:
            raise CacheUnavailable(f"the memory of cache process {incarnation} has gone")
        if offset < 0 or offset + nbytes > len(memory):
            raise CacheUnavailable("a chunk lies outside of the shared memory")
        if self._lives(incarnation):
            self._use(self._serving(), incarnation, memory)
        return memory[offset : offset + nbytes]

    def _use(self, pages: Pages, incarnation: str, memory: memoryview) -> None:
        pages.use_memory(incarnation, memory)
        self._in_use = incarnation

    def _lives(self, incarnation: str) -> bool:
        return self._client.connected and self._client.incarnation == incarnation

    def _let_go_of_the_dead(self) -> None:
        """Memory that pages refer to is not freed, and a successor may need what that takes."""
        if self._pages is not None and self._in_use is not None and not self._lives(self._in_use):
            self._pages.close()
            self._in_use = None

    def _count_error(self, what: str, error: Exception) -> None:
        self.counts[f"{what}_errors"] += 1
        kind = f"{what}: {type(error).__name__}"
        if kind in self._logged:
            return
        self._logged.add(kind)
        known = isinstance(error, CacheUnavailable)
        _log.warning(
            "could not %s KV; serving goes on, and more of this kind is only counted: %s",
            what, error, exc_info=None if known else error,
        )  # fmt: skip
