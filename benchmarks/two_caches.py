"""Two caches in two processes, without a controller: a source, and a destination in this process.

:class:`Destination` reads the same bytes in several ways: by the kit's transports, by whole moves,
and by the bare baselines that both are compared with.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from fleet import LLAMA, LOCATION, SMOLLM2
from lmcache_kit_cpu_backend.backend import LocalCPUBackend
from lmcache_kit_nixl_transport import library, ucx_environment
from lmcache_kit_nixl_transport.probe import why_not
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.config import KitConfig
from lmcache_kit.errors import CodecError
from lmcache_kit.interfaces import Codec, Link, ReadableRegion, Region, Transport
from lmcache_kit.interfaces.operations import Move, OperationStatus, Peer, Progress, Scope
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.peer.move_executor import MoveContext, MoveExecutor
from lmcache_kit.peer.service import PeerService
from lmcache_kit.peer.sockets import Listener, dial
from lmcache_kit.plugins import Plugins
from lmcache_kit.protocol.capability import Capability

HOST = "127.0.0.1"
CHUNK = 256
SOURCE_BYTES = 512 << 20
DESTINATION_BYTES = 2304 << 20
"""A move reserves at most an eighth at a time, which is more than 256 MiB."""
WAIT_S = 60.0


class Payload(NamedTuple):
    """KV to move: ``tokens`` of ``namespace``, in chunks of 256 tokens."""

    name: str
    namespace: Namespace
    tokens: Sequence[int]

    @property
    def sizes(self) -> list[int]:
        layout, count = self.namespace.layout, len(self.tokens)
        return [layout.payload_bytes(min(CHUNK, count - at)) for at in range(0, count, CHUNK)]


_LLAMA = Namespace("bench/llama-8b", LLAMA, CHUNK)
_SMOLLM2 = Namespace("bench/smollm2", SMOLLM2, CHUNK)
PAYLOADS = (
    Payload("8 x 32 MiB", _LLAMA, range(8 * CHUNK)),
    Payload("32 x 5.6 MiB", _SMOLLM2, range(32 * CHUNK)),
    Payload("1 x 270 KiB", _SMOLLM2, range(100_000, 100_012)),
)


class SourceInfo(NamedTuple):
    """Everything that the destination must know of the source.

    ``offers`` and ``regions`` have one item per payload. ``slab`` is the address of the memory.
    """

    key: bytes
    incarnation: bytes
    url: str
    addresses: dict[str, bytes]
    offers: dict[str, list[bytes]]
    regions: list[list[Region]]
    tcp_port: str
    socket_port: int
    slab: int
    nixl_metadata: bytes


class _Cache:
    """A memory tier, its engine, and the namespaces that moves look up."""

    def __init__(self, nbytes: int) -> None:
        self.incarnation = secrets.token_bytes(16)
        self.memory = LocalCPUBackend(nbytes)
        self.engine = CacheEngine(self.memory, LRU(), location=LOCATION)
        self.namespaces = NamespaceRegistry()
        for namespace in (_LLAMA, _SMOLLM2):
            self.namespaces.register(namespace)
        self.plugins = Plugins.load()
        self.slab = ctypes.addressof((ctypes.c_char * nbytes).from_buffer(self.memory.memory))

    def peer(self, name: str, channel: str) -> PeerService:
        config = KitConfig(
            enable_p2p=True, lmcache_instance_id=name, p2p_host=HOST, transfer_channel=channel
        )
        made = PeerService(
            config,
            self.plugins,
            self.memory,
            self.engine,
            namespaces=self.namespaces,
            get_codec=_no_codec,
            incarnation=self.incarnation,
        )
        made.start()
        return made

    def moves(self, peer: PeerService) -> MoveExecutor:
        """Return the executor of the moves in which this peer is the destination."""
        return MoveExecutor(MoveContext(self.engine, self.namespaces, lambda *_: True, peer.access))

    def nixl(self) -> Any:
        """Return an agent of NIXL itself, with this memory registered."""
        with ucx_environment.loopback_only(HOST):
            agent = library.new_agent(library.load(), secrets.token_hex(16), ("UCX",), 1000)
        agent.register_memory([(self.slab, len(self.memory.memory), 0, "")], "DRAM")
        return agent

    def store(self, payload: Payload) -> list[Region]:
        """Store random bytes; return their regions."""
        packed = pack_tokens(payload.tokens)
        items = [
            StoreItem(link.parent, packed[link.start * 4 : link.end * 4], nbytes, link.start)
            for link, nbytes in zip(
                chain(payload.namespace.digest, packed, CHUNK), payload.sizes, strict=True
            )
        ]
        rank_layout = RankLayout(payload.namespace.layout)
        grants = self.engine.allocate(
            payload.namespace.digest, 0, 1, CHUNK, items, "bench", rank_layout
        )
        regions = [Region(g.offset, item.nbytes) for g, item in zip(grants, items, strict=True)]
        written = []
        for grant, region in zip(grants, regions, strict=True):
            with self.memory.view(region) as view:
                view[:] = np.random.default_rng(region.offset).bytes(region.nbytes)
                written.append((grant.ticket, xxh3_64_intdigest(view)))
        assert self.engine.commit(written, "bench") == len(items)
        return regions


def _no_codec(name: str) -> Codec:
    raise CodecError(f"no codec {name} here")


def _transport(peer: PeerService, name: str) -> Transport:
    """Return the transport of the peer's own moves; a second one would add a progress thread."""
    found = peer._transports.get(name)
    if isinstance(found, str):
        raise RuntimeError(f"transport {name}: {found}")
    return found


# The source.


def run_source(pipe: Connection) -> None:
    """Serve the payloads from this process until the pipe is closed."""
    cache = _Cache(SOURCE_BYTES)
    regions = [cache.store(payload) for payload in PAYLOADS]
    peer = cache.peer("source", "auto")
    names = channels()
    transports = {name: _transport(peer, name) for name in names}
    listener = Listener(HOST, 0, transports["tcp"].serve)
    listener.start()
    plain = socket.create_server((HOST, 0))
    threading.Thread(target=_send_plainly, args=(plain, cache, regions), daemon=True).start()
    agent = cache.nixl() if "nixl" in names else None
    readable = [[ReadableRegion(region, 0) for region in group] for group in regions]
    pipe.send(
        SourceInfo(
            peer.key,
            cache.incarnation,
            peer.url,
            {name: each.address() for name, each in transports.items()},
            {name: [each.offer(group) for group in readable] for name, each in transports.items()},
            regions,
            listener.url,
            plain.getsockname()[1],
            cache.slab,
            bytes(agent.get_agent_metadata()) if agent else b"",
        )
    )
    with suppress(EOFError):
        pipe.recv()
    os._exit(0)


def _send_plainly(server: socket.socket, cache: _Cache, regions: Sequence[list[Region]]) -> None:
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = cache.memory.memory
    while request := connection.recv(1):
        for region in regions[request[0]]:
            connection.sendall(memory[region.offset : region.offset + region.nbytes])


def channels() -> list[str]:
    """Return the names of the transports that work on this machine."""
    return ["tcp"] if why_not() else ["nixl", "tcp"]


# The destination.


class MoveListener:
    """Record when a move ends, and how."""

    def __init__(self) -> None:
        self.ended_at = 0.0
        self.status = OperationStatus("running")
        self.over = threading.Event()

    def accepted(self, scope: Scope) -> None:
        """Not measured."""

    def progressed(self, progress: Progress) -> None:
        """Not measured."""

    def ended(self, status: OperationStatus) -> None:
        self.ended_at, self.status = time.perf_counter(), status
        self.over.set()


class Destination:
    """Start the source, and read payloads from it. All memory is touched before it is timed."""

    def __init__(self) -> None:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_source, args=(theirs,)
        )
        self._process.start()
        theirs.close()
        self._pipe = ours
        self._cache = _Cache(DESTINATION_BYTES)
        self.channels = channels()
        if not ours.poll(WAIT_S):
            raise TimeoutError("the source did not start")
        self.source: SourceInfo = ours.recv()
        self._into = [self._allocate(payload) for payload in PAYLOADS]
        self._peers = {
            name: self._cache.peer(f"destination-{name}", name) for name in self.channels
        }
        self._moves = {name: self._cache.moves(peer) for name, peer in self._peers.items()}
        self._links = {name: self._connect(name) for name in self.channels}
        self._plain = socket.create_connection((HOST, self.source.socket_port))
        self._plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._hashing = ThreadPoolExecutor(1)
        self._agent: Any = None
        self._peer = ""
        if "nixl" in self.channels:
            self._agent = self._cache.nixl()
            name = self._agent.add_remote_agent(self.source.nixl_metadata)
            self._peer = name.decode() if isinstance(name, bytes) else name
        self._copies = [np.ones(sum(payload.sizes), np.uint8) for payload in PAYLOADS]

    def ways(self, number: int) -> dict[str, Callable[[], float]]:
        """Return functions that read payload ``number`` once and return the seconds it took."""
        found: dict[str, Callable[[], float]] = {
            "memcpy": lambda: _timed(lambda: self._memcpy(number)),
            "xxh3": lambda: _timed(lambda: self._hash(number)),
            "sockets": lambda: _timed(lambda: self._sockets(number)),
        }
        if self._agent:
            found["raw nixl"] = lambda: _timed(lambda: self._raw_nixl(number))
            found["nixl+xxh3"] = lambda: _timed(lambda: self._read_and_hash("nixl", number))
        for name in self.channels:
            found[f"{name} link"] = lambda name=name: _timed(lambda: self._read(name, number))  # type: ignore[misc]
            found[f"{name} move"] = lambda name=name: self.move(name, number)[0]  # type: ignore[misc]
        return found

    def move(self, name: str, number: int) -> tuple[float, float]:
        """Return the seconds of a whole move, and those of its transfer."""
        source, payload = self.source, PAYLOADS[number]
        operation_id, listener = secrets.token_hex(16), MoveListener()
        request = Move(
            location=LOCATION,
            tokens=pack_tokens(payload.tokens),
            model=payload.namespace.model,
            source="source",
            source_location=LOCATION,
            copy=True,
        )
        signature = Capability.of(request, operation_id, f"destination-{name}").sign(source.key)
        fields = {field: getattr(request, field) for field in request.__struct_fields__}
        peer = Peer(operation_id, source.url, source.incarnation, signature)

        begun = time.perf_counter()
        self._moves[name].start(
            Move(**{**fields, "peer": peer}), deadline_s=WAIT_S, listener=listener
        )
        listener.over.wait(WAIT_S)
        status = listener.status
        transfer = status.progress.transfer
        if status.state != "done" or not transfer or transfer.transport != name:
            raise RuntimeError(f"a move by {name} failed: {status}")
        assert status.tokens == len(payload.tokens)
        self._cache.engine.memory_tier.clear()
        return listener.ended_at - begun, transfer.seconds

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        for moves in self._moves.values():
            moves.close()
        for peer in self._peers.values():
            peer.close()
        self._hashing.shutdown()
        self._plain.close()
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _allocate(self, payload: Payload) -> list[Region]:
        """Return touched memory for the ways that are not moves."""
        found = []
        for nbytes in payload.sizes:
            region = self._cache.memory.allocate(nbytes)
            assert region is not None
            with self._cache.memory.view(region) as view:
                np.frombuffer(view, np.uint8).fill(1)
            found.append(region)
        return found

    def _connect(self, name: str) -> Link:
        transport = _transport(self._peers[name], name)
        return transport.connect(
            self.source.addresses[name],
            lambda left_s: _blocking(dial(self.source.tcp_port, left_s)),
            WAIT_S,
        )

    def _memcpy(self, number: int) -> None:
        at = 0
        for region in self._into[number]:
            with self._cache.memory.view(region) as view:
                target = np.frombuffer(view, np.uint8)
                np.copyto(target, self._copies[number][at : at + region.nbytes])
                del target
            at += region.nbytes

    def _hash(self, number: int) -> None:
        """Hash bytes in memory on one thread: the cost of verification alone."""
        for region in self._into[number]:
            with self._cache.memory.view(region) as view:
                xxh3_64_intdigest(view)

    def _sockets(self, number: int) -> None:
        self._plain.send(bytes([number]))
        for region in self._into[number]:
            with self._cache.memory.view(region) as view:
                rest = view
                while rest:
                    rest = rest[self._plain.recv_into(rest) :]

    def _raw_nixl(self, number: int) -> None:
        agent, here, there = self._agent, self._cache.slab, self.source.slab
        local = [(here + at, nbytes, 0) for at, nbytes in self._into[number]]
        remote = [(there + at, nbytes, 0) for at, nbytes in self.source.regions[number]]
        handle = agent.initialize_xfer(
            "READ",
            agent.get_xfer_descs(local, "DRAM"),
            agent.get_xfer_descs(remote, "DRAM"),
            self._peer,
        )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        handle.release()

    def _read(self, name: str, number: int) -> None:
        into = self._into[number]
        results = list(self._links[name].read(self.source.offers[name][number], into, WAIT_S))
        assert len(results) == len(into)

    def _read_and_hash(self, name: str, number: int) -> None:
        """Read, and hash each region on a second thread as soon as it is complete."""
        into, memory = self._into[number], self._cache.memory.memory
        hashed: list[Future[int]] = []
        for result in self._links[name].read(self.source.offers[name][number], into, WAIT_S):
            at, nbytes = into[result.number]
            hashed.append(self._hashing.submit(xxh3_64_intdigest, memory[at : at + nbytes]))
        for each in hashed:
            each.result()


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _blocking(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    return connection
