"""Lookups whose chunks are read and compared with their checksums before they are promised.

For engines in which a load that fails costs the request an error. A thread of the scheduler's
process reads the chunks, while vLLM goes on with other requests.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
from xxhash import xxh3_64_intdigest

from lmcache_kit.errors import CacheUnavailable

if TYPE_CHECKING:
    from lmcache_kit.cache.records import Located
    from lmcache_kit.keys import Namespace
    from lmcache_kit.process.client import CacheClient, PendingLookup
    from lmcache_kit.protocol.local import Found


class VerifiedLookups:
    """A client of the scheduler role that promises only what it has verified."""

    def __init__(self, client: CacheClient) -> None:
        self._client = client
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lmcache-kit-verify")

    def begin_lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> VerifiedLookup:
        """Begin a lookup; its answer comes once all chunks are verified."""
        pending = self._client.begin_lookup(namespace, tokens, chunk_size)
        return VerifiedLookup(self._client, pending, self._pool)

    def release(self, lease: int, *, everyone: bool = False) -> None:
        self._client.release(lease, everyone=everyone)

    def use_namespace(self, namespace: Namespace) -> None:
        self._client.use_namespace(namespace)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._client.close()


class VerifiedLookup:
    """A lookup under way, and then its verification."""

    def __init__(
        self, client: CacheClient, pending: PendingLookup, pool: ThreadPoolExecutor
    ) -> None:
        self._client = client
        self._pending = pending
        self._pool = pool
        self._verification: Future[Found] | None = None

    def poll(self, wait_s: float = 0.0) -> Found | None:
        """Return the answer, once, if it comes within ``wait_s`` seconds, else None.

        Raises CacheUnavailable, and CacheTimeout when the lookup's answer is overdue.
        """
        if self._verification is None:
            found = self._pending.poll(wait_s)
            if found is None or not found.lease:
                return found
            self._verification = self._pool.submit(verified, self._client, found)
        try:
            return self._verification.result(wait_s)
        except TimeoutError:
            return None

    def abandon(self) -> None:
        """Do not wait any more."""
        if self._verification is None:
            self._pending.abandon()
        else:
            self._verification.add_done_callback(self._release)

    def _release(self, verification: Future[Found]) -> None:
        if not verification.cancelled() and not verification.exception():
            self._client.release(verification.result().lease, everyone=True)


def verified(client: CacheClient, found: Found) -> Found:
    """Return what comes before the first chunk that is damaged; report each that is."""
    damaged = [at for at, chunk in enumerate(found.chunks) if not _is_whole(client, found, chunk)]
    for at in damaged:
        if found.incarnation == client.incarnation:
            try:
                client.report_corrupt(found.chunks[at].key)
            except CacheUnavailable:
                break  # the process has gone, and its chunks with it
    if not damaged:
        return found
    chunks = found.chunks[: damaged[0]]
    if not chunks:
        client.release(found.lease, everyone=True)
    return msgspec.structs.replace(found, lease=found.lease if chunks else 0, chunks=chunks)


def _is_whole(client: CacheClient, found: Found, chunk: Located) -> bool:
    memory = client.memory(found.incarnation)
    return memory is not None and all(
        0 <= each.offset <= each.offset + each.nbytes <= len(memory)
        and xxh3_64_intdigest(memory[each.offset : each.offset + each.nbytes]) == each.checksum
        for each in chunk.extents
    )
