"""Stand-ins: a cache process in memory that can be told to fail, and what vLLM passes in."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from xxhash import xxh3_64

from lmcache_kit.cache.records import Extent, Grant, Located, StoreItem
from lmcache_kit.errors import CacheTimeout
from lmcache_kit.keys import Namespace, chunk_key, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.process.client import Grants
from lmcache_kit.protocol.local import Found

CHUNK = 8
BLOCK = 4
LAYOUT = KVLayout("float32", layers=1, kv_heads=1, head_dim=1)
NAMESPACE = Namespace("model", LAYOUT, CHUNK)


class FakeLookup:
    """Its answer comes when the client is not ``slow`` (any more)."""

    def __init__(self, client: FakeClient, found: Found) -> None:
        self.client = client
        self.found = found

    def poll(self, wait_s: float = 0.0) -> Found | None:
        self.client._called("poll")
        return None if self.client.slow else self.found

    def abandon(self) -> None:
        self.client.release(self.found.lease, everyone=True)


class FakeClient:
    """A cache of whole chunks in a few bytes of memory, of one rank."""

    def __init__(self) -> None:
        self.incarnation: str | None = "life-1"
        self.connected = True
        self.bytes = bytearray(1 << 16)
        self.chunks: dict[bytes, tuple[bytes, Extent]] = {}
        self.pending: dict[int, tuple[bytes, bytes, Extent]] = {}
        self.leases: dict[int, str] = {}
        self.corrupt: list[bytes] = []
        self.abandoned: list[int] = []
        self.calls: list[str] = []
        self.namespaces: list[Namespace] = []
        self.starts: list[int] = []
        self.fails: set[str] = set()
        self.refuses = False
        self.slow = False
        self._next = 1
        self._offset = 0

    def begin_lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> FakeLookup:
        self._called("lookup")
        return FakeLookup(self, self.lookup(namespace, tokens, chunk_size))

    def lookup(self, namespace: bytes, tokens: bytes, chunk_size: int) -> Found:
        found, parent, start = [], namespace[:16], 0
        while start < len(tokens) // 4:
            part = tokens[start * 4 : (start + chunk_size) * 4]
            key = chunk_key(namespace, parent, part)
            if key not in self.chunks:
                break
            count = len(part) // 4
            found.append(Located(key, start, count, count, (self.chunks[key][1],)))
            start, parent = start + count, key
        lease = self._number() if found else 0
        if lease:
            self.leases[lease] = "held"
        assert self.incarnation is not None
        return Found(lease, self.incarnation, tuple(found))

    def allocate(self, namespace: bytes, chunk_size: int, items: Sequence[StoreItem]) -> Grants:
        self._called("allocate")
        grants = []
        for item in items:
            self.starts.append(item.start)
            key = chunk_key(namespace, item.parent, item.tokens)
            if key in self.chunks or any(key == pending[0] for pending in self.pending.values()):
                grants.append(Grant("present"))
            elif self.refuses:
                grants.append(Grant("refused"))
            else:
                ticket, extent = self._number(), Extent(self._offset, item.nbytes, 0)
                self._offset += item.nbytes
                self.pending[ticket] = key, item.tokens, extent
                grants.append(Grant("granted", ticket, extent.offset))
        assert self.incarnation is not None
        return Grants(grants, self.incarnation)

    def commit(self, written: Sequence[tuple[int, int]]) -> int:
        self._called("commit")
        for ticket, checksum in written:
            key, tokens, extent = self.pending.pop(ticket)
            self.chunks[key] = tokens, extent._replace(checksum=checksum)
        return len(written)

    def abandon(self, tickets: Sequence[int]) -> None:
        self._called("abandon")
        self.abandoned += tickets
        for ticket in tickets:
            self.pending.pop(ticket)

    def release(self, lease: int, *, everyone: bool = False) -> None:
        self.calls.append("release")
        assert self.leases[lease] == "held", "a lease is released once"
        self.leases[lease] = "everyone" if everyone else "rank"

    def report_corrupt(self, key: bytes) -> None:
        self._called("report_corrupt")
        self.corrupt.append(key)
        self.chunks.pop(key, None)

    def use_namespace(self, namespace: Namespace) -> None:
        self.namespaces.append(namespace)

    def memory(self, incarnation: str) -> memoryview | None:
        return memoryview(self.bytes) if incarnation == "life-1" else None

    def close(self) -> None:
        self.calls.append("close")

    def store(self, tokens: Sequence[int], namespace: Namespace = NAMESPACE) -> None:
        """Put all chunks of these tokens in, as a worker would have."""
        packed, digest = pack_tokens(tokens), namespace.digest
        parent = digest[:16]
        for start in range(0, len(tokens), CHUNK):
            part = packed[start * 4 : (start + CHUNK) * 4]
            nbytes = LAYOUT.payload_bytes(len(part) // 4)
            (grant,) = self.allocate(digest, CHUNK, [StoreItem(parent, part, nbytes)])
            payload = bytes([start % 251 + 1]) * nbytes
            self.bytes[grant.offset : grant.offset + nbytes] = payload
            self.commit([(grant.ticket, xxh3_64(payload).intdigest())])
            parent = chunk_key(digest, parent, part)
        self.calls.clear()

    def held(self) -> int:
        return sum(state == "held" for state in self.leases.values())

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise CacheTimeout(f"{name} took too long")

    def _number(self) -> int:
        self._next += 1
        return self._next


def new_request(tokens: Sequence[int], request_id: str = "r", **more: Any) -> Any:
    """As much of a vLLM request as the connector reads."""
    defaults: dict[str, Any] = {
        "request_id": request_id,
        "all_token_ids": list(tokens),
        "prompt_token_ids": list(tokens),
        "num_prompt_tokens": len(tokens),
        "num_tokens": len(tokens),
        "num_computed_tokens": 0,
        "num_in_flight_tokens": 0,
        "mm_features": [],
        "prompt_embeds": None,
        "pooling_params": None,
        "resumable": False,
        "skip_reading_prefix_cache": False,
        "kv_transfer_params": None,
        "lora_request": None,
        "cache_salt": None,
    }
    return SimpleNamespace(**(defaults | more))


def generated(request: Any, *tokens: int) -> None:
    """The model has sampled these."""
    request.all_token_ids += tokens
    request.num_tokens += len(tokens)


def scheduled(**counts: int) -> Any:
    """A scheduler's output: tokens scheduled by request; blocks are numbered from 10 on."""
    state = SimpleNamespace(get_block_ids=lambda request_id: (list(range(10, 60)),))
    return SimpleNamespace(num_scheduled_tokens=counts, kv_connector_block_state=state)
