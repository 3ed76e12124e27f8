"""Caches that take part in moves, in this process: real memory, real sockets, real transports."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
import pytest
from lmcache_kit_cpu_backend.backend import LocalCPUBackend
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.config import KitConfig
from lmcache_kit.interfaces import Backend, Region
from lmcache_kit.interfaces.operations import Move, OperationStatus, Peer
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.peer.move_executor import MoveContext, MoveExecutor
from lmcache_kit.peer.promotion import ROOM_S
from lmcache_kit.peer.service import PeerService
from lmcache_kit.plugins import Plugins
from lmcache_kit.protocol.capability import Capability
from lmcache_kit.service.codecs import Codecs
from tests.control.fakes import RecordingListener
from tests.support.waiting import eventually

PLACE = "LocalCPUBackend"
CHUNK = 16
LAYOUT = KVLayout("bfloat16", layers=2, kv_heads=2, head_dim=64)
BASE = Namespace("acme/model", LAYOUT, CHUNK)
DEADLINE_S = 30.0


def payload(tokens: Sequence[int], rank: int, layout: KVLayout = LAYOUT) -> bytes:
    """Bytes that only these tokens and this rank have."""
    seed = pack_tokens(tokens) + bytes([rank + 1])
    nbytes = layout.payload_bytes(len(tokens))
    return (seed * (nbytes // len(seed) + 1))[:nbytes]


class Running(RecordingListener):
    """A move that was started, and its course."""

    def __init__(self, place: Place, request: Move, deadline_s: float) -> None:
        super().__init__()
        self.move = place.moves.start(request, deadline_s=deadline_s, listener=self)

    @property
    def outcome(self) -> OperationStatus:
        return self.wait(DEADLINE_S)


class Place:
    """One cache that takes part in moves, and what a worker would do."""

    def __init__(
        self,
        name: str,
        *,
        base: Namespace | None = BASE,
        ranks: int = 1,
        mib: float = 4,
        stores: Sequence[Backend] = (),
        plugins: Plugins | None = None,
        room_s: float = ROOM_S,
        **keys: object,
    ) -> None:
        self.name = name
        self.base = base or BASE
        self.ranks = ranks
        self.incarnation = secrets.token_bytes(16)
        self.confirms = True
        self.asked_to_confirm = 0
        self.before_confirm: Callable[[], object] = lambda: None
        self.memory = LocalCPUBackend(int(mib * (1 << 20)))
        self.engine = CacheEngine(self.memory, LRU(), location=PLACE)
        self.namespaces = NamespaceRegistry()
        if base is not None:
            self.namespaces.register(base)
        plugins = plugins or Plugins.load()
        # Lossless, so that what is read can be compared with what was stored.
        self.codecs = Codecs(plugins, {"cachegen": {"level": 0}})
        self.stores = stores
        self.tiers = [
            StoreTier(store, LRU(), location=location, get_codec=self.codecs.make)
            for store, location in zip(stores, "ABC", strict=False)
        ]
        below = self.engine.attach(self.tiers, self.codecs.make)
        self.engine.memory_tier.subscribe(below)
        defaults: dict[str, object] = {
            "enable_p2p": True,
            "lmcache_instance_id": name,
            "p2p_host": "127.0.0.1",
            "transfer_channel": "tcp",
        }
        self.peer = PeerService(
            KitConfig(**{**defaults, **keys}),  # type: ignore[arg-type]
            plugins,
            self.memory,
            self.engine,
            namespaces=self.namespaces,
            get_codec=self.codecs.make,
            incarnation=self.incarnation,
            room_s=room_s,
        )
        self.peer.start()
        self.moves = MoveExecutor(
            MoveContext(self.engine, self.namespaces, self._confirm, self.peer.access)
        )

    def _confirm(self, location: str, timeout_s: float) -> bool:
        self.asked_to_confirm += 1
        self.before_confirm()
        return self.confirms

    def store(self, tokens: Sequence[int], space: Namespace | None = None) -> int:
        """How many chunks are new."""
        digest, packed, new = (space or self.base).digest, pack_tokens(tokens), 0
        links = list(chain(digest, packed, CHUNK))
        for rank in range(self.ranks):
            items = [
                StoreItem(
                    link.parent,
                    packed[link.start * 4 : link.end * 4],
                    LAYOUT.payload_bytes(link.end - link.start),
                    link.start,
                )
                for link in links
            ]
            grants = self.engine.allocate(
                digest,
                rank,
                self.ranks,
                CHUNK,
                items,
                "worker",
                RankLayout(LAYOUT, first_head=2 * rank),
            )
            written = []
            for link, item, grant in zip(links, items, grants, strict=True):
                if grant.status == "granted":
                    data = payload(tokens[link.start : link.end], rank)
                    self.memory.view(Region(grant.offset, item.nbytes))[:] = data
                    written.append((grant.ticket, xxh3_64_intdigest(data)))
            new = self.engine.commit(written, "worker")
        return new

    def hit(self, tokens: Sequence[int], space: Namespace | None = None) -> int:
        """How many tokens a lookup finds; what it finds is what was stored, byte by byte."""
        digest = (space or self.base).digest
        match = self.engine.lookup(digest, pack_tokens(tokens), CHUNK, self.ranks, "reader", 20)
        for located in match.chunks:
            assert len(located.extents) == self.ranks
            for rank, extent in enumerate(located.extents):
                data = bytes(self.memory.view(Region(extent.offset, extent.nbytes)))
                assert xxh3_64_intdigest(data) == extent.checksum
                whole = tokens[located.start : located.start + located.tokens]
                if len(whole) == located.tokens:
                    assert data == payload(whole, rank)
        self.engine.release(match.lease, None)
        return match.chunks[-1].end if match.chunks else 0

    def request(
        self,
        source: Place,
        tokens: Sequence[int] | None = None,
        *,
        event_id: str | None = None,
        salt: str = "",
        model: str | None = None,
        copy: bool = False,
        at: str = PLACE,
        to: str = PLACE,
        url: str | None = None,
        signed: Capability | None = None,
        incarnation: bytes | None = None,
    ) -> Move:
        """As the controller sends it; ``at`` and ``to`` are locations there and here."""
        event_id = event_id or secrets.token_hex(8)
        request = Move(
            location=to,
            tokens=None if tokens is None else pack_tokens(tokens),
            cache_salt=salt,
            model=model,
            source=source.name,
            source_location=at,
            copy=copy,
        )
        capability = signed or Capability.of(request, event_id, self.name)
        peer = Peer(
            event_id,
            url or source.peer.url,
            incarnation or source.incarnation,
            capability.sign(source.peer.key),
        )
        return msgspec.structs.replace(request, peer=peer)

    def start(self, request: Move, deadline_s: float = 60.0) -> Running:
        return Running(self, request, deadline_s)

    def move(
        self, source: Place, tokens: Sequence[int] | None = None, **how: object
    ) -> OperationStatus:
        """Take from there, and wait for the end."""
        return self.start(self.request(source, tokens, **how)).outcome  # type: ignore[arg-type]

    def everything(self) -> set[bytes]:
        """Keys of all that is stored."""
        return {chunk.key for chunk in self.engine.memory_tier.chunk_refs(None, None)}

    @property
    def idle(self) -> bool:
        """Whether nothing is held for anybody."""
        stats = self.stats()
        names = ("leases", "writers", "pending", "quarantined_bytes")
        return not any(stats[name] for name in names)

    def at(self, location: str) -> set[bytes]:
        """Keys of all that is at one location."""
        return {each.key for each in self.engine.locations[location].chunk_refs(None, None)}

    def settle(self) -> None:
        """Until all that was sent down is there."""
        for tier in self.tiers:
            assert tier.executor.flush(DEADLINE_S)
            assert tier.executor.flush(DEADLINE_S)

    def stats(self) -> dict[str, float]:
        return {**self.engine.stats(), **self.peer.stats()}

    def close(self) -> None:
        self.moves.close()
        self.peer.close()
        if self.engine.lower_tiers:
            self.engine.lower_tiers.close()
        self.engine.close()


class MakePlace(Protocol):
    def __call__(self, name: str, **how: object) -> Place: ...


@pytest.fixture
def make_place() -> Iterator[MakePlace]:
    """Each is closed in the end, and must have no hold left."""
    made: list[Place] = []
    with contextlib.ExitStack() as places:

        def make(name: str, **how: object) -> Place:
            place = Place(name, **how)  # type: ignore[arg-type]
            places.callback(place.close)
            made.append(place)
            return place

        yield make
        eventually(lambda: all(place.idle for place in made))


@pytest.fixture
def source(make_place: MakePlace) -> Place:
    return make_place("source")


@pytest.fixture
def goal(make_place: MakePlace) -> Place:
    """Where moves go to."""
    return make_place("goal")


class Eventually(Protocol):
    def __call__(self, holds: Callable[[], object], what: str = ...) -> object: ...


@pytest.fixture(name="eventually")
def eventually_fixture() -> Eventually:
    return eventually
