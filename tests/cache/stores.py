"""A store in a dict, which can be told to misbehave, and a cache with such tiers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.errors import BackendError, ConfigError
from lmcache_kit.interfaces import Backend, Blob, BlobRecord, Region, StoreUsage
from lmcache_kit.interfaces.codec import Codec
from lmcache_kit.keys import chain, pack_tokens

NAMESPACE = bytes(range(32))
CHUNK = 4
WAIT_S = 30.0


class Dict(Backend):
    """``blobs`` may be shared with others, or outlive it. ``broken``: everything fails.
    ``gate``: what is read waits for it. ``refused``: the key of what finds no room."""

    def __init__(
        self, blobs: dict[bytes, tuple[bytes, bytes]] | None = None, capacity: int | None = None
    ) -> None:
        self.blobs = {} if blobs is None else blobs
        self.capacity = capacity
        self.broken: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.refused = b""
        self.closed = False
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.broken:
            raise self.broken
        if self.closed:
            raise BackendError("closed")

    def put(self, key: bytes, meta: bytes, data: Sequence[memoryview]) -> bool:
        self._call("put")
        blob = meta, b"".join(data)
        others = sum(len(each) for name, (_, each) in self.blobs.items() if name != key)
        if key == self.refused:
            return False
        if self.capacity is not None and others + len(blob[1]) > self.capacity:
            return False
        self.blobs[key] = blob
        return True

    def get(self, key: bytes) -> Blob | None:
        self._call("get")
        self.gate.wait(WAIT_S)
        return Blob(*self.blobs[key]) if key in self.blobs else None

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        self._call("contains")
        return [key in self.blobs for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        self._call("remove")
        for key in keys:
            self.blobs.pop(key, None)

    def scan(self) -> Iterator[BlobRecord]:
        self._call("scan")
        for key, (meta, data) in list(self.blobs.items()):
            yield BlobRecord(key, meta, len(data))

    def usage(self) -> StoreUsage:
        self._call("usage")
        held = sum(len(data) for _, data in self.blobs.values())
        return StoreUsage(len(self.blobs), held, self.capacity)

    def close(self) -> None:
        self.closed = True


class SharedDict(Dict):
    shared = True


def no_codec(name: str) -> Codec:
    raise ConfigError(f"no codec {name}")


class Cache:
    """An engine over ``memory`` with ``stores`` below it, named A, B, ..., and its one worker."""

    def __init__(
        self,
        make_engine: Callable[..., CacheEngine],
        *stores: Dict,
        memory: int = 1000,
        clock: Callable[[], float],
        get_codec: Callable[[str], Codec] = no_codec,
    ) -> None:
        self.engine = make_engine(memory)
        self.stores = stores
        self.tiers = [
            StoreTier(store, LRU(), location=name, get_codec=get_codec, clock=clock)
            for name, store in zip("ABC", stores, strict=False)
        ]
        self.below = self.engine.attach(self.tiers, get_codec)
        self.engine.memory_tier.subscribe(self.below)
        self.below.start()
        self.settle()

    def settle(self) -> None:
        """Until all that was sent down is there."""
        for tier in self.tiers:
            assert tier.executor.flush(WAIT_S)
            assert tier.executor.flush(WAIT_S)  # what that brought about

    def store(self, tokens: Sequence[int], nbytes: int = 100) -> None:
        packed = pack_tokens(tokens)
        items = [
            StoreItem(link.parent, packed[link.start * 4 : link.end * 4], nbytes, link.start)
            for link in chain(NAMESPACE, packed, CHUNK)
        ]
        written = []
        for item, grant in zip(
            items, self.engine.allocate(NAMESPACE, 0, 1, CHUNK, items, "worker"), strict=True
        ):
            if grant.status == "granted":
                content = content_of(item.tokens, nbytes)
                self.engine.memory.view(Region(grant.offset, nbytes))[:] = content
                written.append((grant.ticket, xxh3_64_intdigest(content)))
        self.engine.commit(written, "worker")
        self.settle()

    def hit(self, tokens: Sequence[int], wait_s: float = WAIT_S) -> int:
        """How many tokens a lookup finds; what they lead to is compared."""
        match = self.engine.lookup(NAMESPACE, pack_tokens(tokens), CHUNK, 1, "scheduler", wait_s)
        for located in match.chunks:
            [extent] = located.extents
            got = bytes(self.engine.memory.view(Region(extent.offset, extent.nbytes)))
            assert xxh3_64_intdigest(got) == extent.checksum
            whole = pack_tokens(tokens[located.start : located.start + located.tokens])
            if located.usable == located.tokens:
                assert got == content_of(whole, extent.nbytes)
        self.engine.release(match.lease, None)
        return match.chunks[-1].end if match.chunks else 0

    def forget_memory(self) -> None:
        """As if all of it had been evicted."""
        self.engine.memory_tier.clear()

    def stat(self, name: str, location: str = "") -> float:
        """Return a metric of the memory tier, or of the tier at ``location``."""
        return self.below.stats()[location][name] if location else self.engine.stats()[name]

    def close(self) -> None:
        self.below.close()


def content_of(tokens: bytes, nbytes: int) -> bytes:
    """What a worker stores for these: different for other tokens."""
    return (tokens * nbytes)[:nbytes]


def keys(tokens: Sequence[int]) -> list[bytes]:
    return [link.key for link in chain(NAMESPACE, pack_tokens(tokens), CHUNK)]


MakeCache = Callable[..., Cache]
