"""KV as a connector stores and reads it, through a client of a cache process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.records import StoreItem
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.process.client import CacheClient

BATCH = 64
"""Chunks that are stored with one request."""


def items_of(namespace: Namespace, tokens: Sequence[int]) -> list[StoreItem]:
    """Return the chunks of a prompt, whole and without tensor parallelism."""
    packed = pack_tokens(tokens)
    return [
        StoreItem(
            chunk.parent,
            packed[chunk.start * 4 : chunk.end * 4],
            namespace.layout.payload_bytes(chunk.end - chunk.start),
            chunk.start,
        )
        for chunk in chain(namespace.digest, packed, namespace.chunk_size)
    ]


def payload(item: StoreItem) -> bytes:
    """Return bytes that only a chunk of these tokens has."""
    return repeated(item.tokens, item.nbytes)


def repeated(data: bytes, nbytes: int) -> bytes:
    """Return ``data`` again and again until there are ``nbytes`` of it."""
    return (data * (nbytes // len(data) + 1))[:nbytes]


def store(
    client: CacheClient,
    namespace: Namespace,
    tokens: Sequence[int],
    payload: Callable[[StoreItem], bytes] = payload,
) -> None:
    """Store the payloads of a prompt; chunks that are stored already are left alone."""
    items = items_of(namespace, tokens)
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        grants = client.allocate(namespace.digest, namespace.chunk_size, batch)
        memory = client.memory(grants.incarnation)
        assert memory is not None
        written = []
        for item, grant in zip(batch, grants, strict=True):
            if grant.status == "granted":
                data = payload(item)
                memory[grant.offset : grant.offset + item.nbytes] = data
                written.append((grant.ticket, xxh3_64_intdigest(data)))
        assert client.commit(written) == len(written)


def hit(client: CacheClient, namespace: Namespace, tokens: Sequence[int]) -> int:
    """Return how many tokens are found, after comparing each chunk's bytes and checksum."""
    found = client.lookup(namespace.digest, pack_tokens(tokens), namespace.chunk_size)
    memory = client.memory(found.incarnation)
    for chunk in found.chunks:
        [extent] = chunk.extents
        assert memory is not None
        data = bytes(memory[extent.offset : extent.offset + extent.nbytes])
        assert xxh3_64_intdigest(data) == extent.checksum
        piece = tokens[chunk.start : chunk.start + chunk.tokens]
        if len(piece) == chunk.tokens:  # else the prompt ends within a chunk
            assert data == repeated(pack_tokens(piece), len(data))
    if found.lease:
        client.release(found.lease, everyone=True)
    return found.tokens
