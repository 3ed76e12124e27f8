"""The source's side of moves between instances: answers one destination per connection."""

from __future__ import annotations

import logging
import secrets
import select
import socket
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_kit.cache.descriptors import ChunkDescriptor, ChunkRef
from lmcache_kit.cache.validation import check_lookup
from lmcache_kit.errors import KitError, OperationFailed, ProtocolError, TransportError
from lmcache_kit.interfaces import ReadableRegion, Region, Transport
from lmcache_kit.keys import ChunkKey
from lmcache_kit.peer.promotion import ROOM_S, promote
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.peer import (
    MAX_LISTED,
    Answer,
    Delete,
    Lease,
    ListChunks,
    Open,
    ReadOffer,
    Release,
    Request,
    Verify,
)

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.namespaces import NamespaceRegistry
    from lmcache_kit.peer.transports import Transports

log = logging.getLogger(__name__)

SEND_S = 30.0
_TOKEN_BYTES = 16
_MAX_REMEMBERED = 16_384
_MAX_NAMESPACES = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """This cache process as a source; ``key`` is its secret capability key."""

    instance_id: str
    incarnation: bytes
    key: bytes


class MoveServer:
    """Serves each move whose capability the controller has signed, once.

    A destination that sends nothing for ``idle_s`` seconds is hung up on. ``room_s``: how long a
    move out of a tier waits for room in memory.
    """

    def __init__(
        self,
        identity: Identity,
        engine: CacheEngine,
        namespaces: NamespaceRegistry,
        transports: Transports,
        *,
        idle_s: float,
        room_s: float = ROOM_S,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self.namespaces = namespaces
        self.transports = transports
        self.room_s = room_s
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._served: OrderedDict[str, None] = OrderedDict()
        self._tokens: set[bytes] = set()

    def may_attach(self, token: bytes) -> bool:
        """Return whether this is the token of a move being served."""
        return any(secrets.compare_digest(token, each) for each in tuple(self._tokens))

    def serve(self, connection: socket.socket, opening: Open) -> None:
        """Answer one destination until either side hangs up, then end its leases."""
        if why := self._refusal(opening):
            log.warning("refused a move: %s", why)
            wire.send(connection, wire.Refused(why), SEND_S)
            return
        destination = opening.capability.destination
        session = MoveSession(self, opening)
        self._tokens.add(session.token)
        try:
            answer = session.welcome()
            while True:
                wire.send(connection, answer, SEND_S)
                if isinstance(answer, wire.Refused):
                    log.warning("a move to %r ended: %s", destination, answer.reason)
                    return
                request = wire.receive_request(connection, self._idle_s)
                if request is None:
                    return
                if isinstance(request, Delete) and _is_readable(connection):
                    # A destination that hung up has released its copies, and may lose them.
                    return
                answer = _answer(session, request)
        except TimeoutError:
            log.warning("instance %r sent nothing for %g s", destination, self._idle_s)
        except ProtocolError as error:
            log.warning("instance %r broke the protocol: %s", destination, error)
        finally:
            self._tokens.discard(session.token)
            session.close()

    def _refusal(self, opening: Open) -> str:
        capability, own = opening.capability, self.identity
        if not capability.verify(opening.signature, own.key):
            return "the capability is not signed by our controller"
        if opening.incarnation != own.incarnation:
            return f"instance {own.instance_id!r} has been restarted since the move was requested"
        if capability.source != own.instance_id or capability.location not in self.engine.locations:
            return f"{capability.location!r} of {capability.source!r} is not here"
        with self._lock:
            if capability.operation_id in self._served:
                return f"operation {capability.operation_id} was served before"
            self._served[capability.operation_id] = None
            if len(self._served) > _MAX_REMEMBERED:
                self._served.popitem(last=False)
        return ""


def _is_readable(connection: socket.socket) -> bool:
    """Return whether a peer that should wait for an answer has sent more, or has hung up."""
    return bool(select.select([connection], [], [], 0)[0])


def _answer(session: MoveSession, request: Request) -> Answer:
    try:
        return session.answer(request)
    # A defect, ours or a transport's, must end this move and nothing else.
    except Exception as error:
        log.exception("a peer's %s failed", type(request).__name__)
        return wire.Refused(f"internal error: {type(error).__name__}")


class MoveSession:
    """One move being served, and the owner of its leases. Used by one thread."""

    def __init__(self, server: MoveServer, opening: Open) -> None:
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._server = server
        self._transfers = server.engine.transfers
        self._capability = opening.capability
        self._tier = server.engine.locations[opening.capability.location]
        self._chunks: list[ChunkRef] = []
        self._allowed: frozenset[bytes] = frozenset()
        self._leases: dict[int, Sequence[ChunkDescriptor]] = {}
        self._offers: dict[int, list[tuple[Transport, bytes]]] = {}

    def welcome(self) -> Answer:
        """Find the chunks that the capability covers."""
        capability, server = self._capability, self._server
        try:
            check_lookup(capability.tokens or b"")
            chosen = server.namespaces.chosen(
                capability.tokens, capability.model, capability.cache_salt
            )
        except (KitError, ValueError) as error:
            return wire.Refused(str(error))
        self._chunks = self._tier.chunk_refs(chosen, capability.tokens)
        self._allowed = frozenset(chunk.key for chunk in self._chunks)
        return wire.Welcome(
            token=self.token,
            base_namespaces=server.namespaces.bases[-_MAX_NAMESPACES:],
            namespaces=tuple(self._tier.namespaces({chunk.namespace for chunk in self._chunks})),
            transports=server.transports.addresses(),
            chunks=len(self._chunks),
            first=self._page(0),
            window_bytes=self._window_bytes(),
        )

    def answer(self, request: Request) -> Answer:
        """Carry one request out."""
        answer: Answer = wire.Done()
        match request:
            case ListChunks():
                answer = wire.Listing(self._page(request.start))
            case Lease():
                answer = self.lease(request)
            case ReadOffer():
                answer = self.read_offer(request)
            case Verify():
                dropped = self._transfers.recheck(request.keys)
                destination = self._capability.destination
                log.warning("instance %r found %d corrupt chunks", destination, dropped)
            case Release():
                self.release(request.lease)
            case Delete():
                answer = self.delete(request)
            case _:
                answer = wire.Refused(f"{type(request).__name__} is out of place here")
        return answer

    def lease(self, request: Lease) -> Answer:
        """Lease chunks, from memory, and offer them."""
        if not self._allowed.issuperset(request.keys):
            return wire.Refused("the capability does not cover a chunk")
        try:
            lease, descriptors = self._lease(request.keys)
        except KitError as error:
            return wire.Refused(str(error))
        if not lease:
            return wire.Leased(0, (), b"")
        self._leases[lease] = descriptors
        answer = self.offer(lease, request.transport, descriptors)
        if isinstance(answer, wire.Refused):
            return answer
        return wire.Leased(lease, tuple(descriptors), answer.offer)

    def read_offer(self, request: ReadOffer) -> Answer:
        """Offer some chunks of a lease."""
        descriptors = self._leases.get(request.lease, ())
        if any(not 0 <= number < len(descriptors) for number in request.chunks):
            return wire.Refused("a chunk that is not leased")
        some = [descriptors[number] for number in request.chunks]
        return self.offer(request.lease, request.transport, some)

    def offer(
        self, lease: int, name: str, descriptors: Sequence[ChunkDescriptor]
    ) -> wire.Offered | wire.Refused:
        """Let a transport read the memory of leased chunks."""
        transport = self._server.transports.get(name)
        if isinstance(transport, str):
            return wire.Refused(f"transport {name}: {transport}")
        regions = [
            ReadableRegion(Region(extent.offset, extent.nbytes), extent.checksum)
            for descriptor in descriptors
            for extent in descriptor.extents
        ]
        try:
            offer = transport.offer(regions)
        except TransportError as error:
            return wire.Refused(str(error))
        self._offers.setdefault(lease, []).append((transport, offer))
        return wire.Offered(offer)

    def delete(self, request: Delete) -> Answer:
        """Delete chunks that the destination has now."""
        if self._capability.copy:
            return wire.Refused("a copy leaves its source as it is")
        if not self._allowed.issuperset(request.keys):
            return wire.Refused("the capability does not cover a chunk")
        return wire.Deleted(self._tier.delete(request.keys))

    def release(self, lease: int) -> None:
        """End a lease: first its offers, so that nothing reads memory that may be reused."""
        for transport, offer in self._offers.pop(lease, ()):
            transport.withdraw(offer)
        if self._leases.pop(lease, None) is not None:
            self._server.engine.release(lease, None)

    def close(self) -> None:
        """End all leases."""
        for lease in list(self._leases):
            self.release(lease)

    def _window_bytes(self) -> int:
        """Limit a window where chunks of a tier have to find room in memory first."""
        engine = self._server.engine
        below = self._tier is not engine.memory_tier
        return wire.window_bytes(len(engine.memory.memory)) if below else wire.WINDOW_BYTES

    def _page(self, start: int) -> tuple[ChunkRef, ...]:
        return tuple(self._chunks[start : start + MAX_LISTED])

    def _lease(self, keys: Sequence[ChunkKey]) -> tuple[int, list[ChunkDescriptor]]:
        """Lease chunks in memory, after those of a tier were promoted.

        Raises BackendError, and OperationFailed when memory has no room for them, not even after
        other moves had time to release theirs.
        """
        engine = self._server.engine
        try:
            if not promote(engine, self._tier, keys, self, self._server.room_s):
                raise OperationFailed(
                    f"memory has no room for what is to be read from {self._tier.location}"
                )
            return self._transfers.lease(keys, self)
        finally:
            if engine.lower_tiers:
                engine.lower_tiers.release(self)
