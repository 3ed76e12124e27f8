"""The side that gives: it answers one peer's move, and hides nothing that the claim names."""

from __future__ import annotations

import logging
import secrets
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_kit.cache.descriptors import ChunkDescriptor, ChunkRef
from lmcache_kit.cache.validation import check_lookup
from lmcache_kit.errors import KitError, OperationFailed, ProtocolError, TransportError
from lmcache_kit.interfaces import ReadableRegion, Region, Transport
from lmcache_kit.keys import ChunkKey
from lmcache_kit.protocol import peer as wire
from lmcache_kit.protocol.peer import (
    MAX_HOLDINGS,
    Answer,
    Forget,
    GiveBack,
    Lend,
    ListMore,
    Offer,
    Open,
    Question,
    Recheck,
)

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.namespaces import NamespaceRegistry
    from lmcache_kit.peer.transports import Transports

log = logging.getLogger(__name__)

SEND_S = 30.0
ROOM_S = 5.0
AGAIN_S = 0.05
_TOKEN_BYTES = 16
_REMEMBERED = 16_384
_MAX_NAMESPACES = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """Who gives. ``key`` is what the controller seals claims with; it is nobody else's."""

    instance_id: str
    incarnation: bytes
    key: bytes


class MoveServer:
    """Gives to whoever shows a sealed claim, each claim once. ``idle_s``: a peer that says nothing
    for so long has gone."""

    def __init__(
        self,
        identity: Identity,
        engine: CacheEngine,
        namespaces: NamespaceRegistry,
        transports: Transports,
        *,
        idle_s: float,
    ) -> None:
        self.identity = identity
        self.engine = engine
        self.namespaces = namespaces
        self.transports = transports
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._tokens: set[bytes] = set()

    def may_attach(self, token: bytes) -> bool:
        """Whether this is the token of a move that goes on."""
        return any(secrets.compare_digest(token, each) for each in tuple(self._tokens))

    def serve(self, connection: socket.socket, opened: Open) -> None:
        """Answer one peer until either side hangs up; what it held ends with that."""
        if why := self._refusal(opened):
            log.warning("refused a move: %s", why)
            wire.send(connection, wire.No(why), SEND_S)
            return
        claim = opened.claim
        session = _Session(self, opened)
        self._tokens.add(session.token)
        try:
            answer = session.welcome()
            while True:
                wire.send(connection, answer, SEND_S)
                if isinstance(answer, wire.No):
                    log.warning("a move to %r ended: %s", claim.destination, answer.why)
                    return
                question = wire.receive_question(connection, self._idle_s)
                if question is None:
                    return
                if isinstance(question, Forget) and _hung_up(connection):
                    return  # it has let go of what it took, and may not have it any more
                answer = _guarded(session, question)
        except TimeoutError:
            log.warning("instance %r said nothing for %g s", claim.destination, self._idle_s)
        except ProtocolError as error:
            log.warning("instance %r made no sense: %s", claim.destination, error)
        finally:
            self._tokens.discard(session.token)
            session.close()

    def _refusal(self, opened: Open) -> str:
        claim, us = opened.claim, self.identity
        if not claim.is_sealed(opened.seal, us.key):
            return "the claim is not sealed by our controller"
        if opened.incarnation != us.incarnation:
            return f"instance {us.instance_id!r} has been restarted since it was ordered"
        if claim.source != us.instance_id or claim.location not in self.engine.locations:
            return f"{claim.location!r} of {claim.source!r} is not here"
        with self._lock:
            if claim.event_id in self._seen:
                return f"event {claim.event_id} has been here before"
            self._seen[claim.event_id] = None
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        return ""


def _hung_up(connection: socket.socket) -> bool:
    """Whether a peer that should wait for an answer says something instead, such as goodbye."""
    return bool(select.select([connection], [], [], 0)[0])


def _guarded(session: _Session, question: Question) -> Answer:
    try:
        return session.answer(question)
    # A defect, ours or a transport's, must end this move and nothing else.
    except Exception as error:
        log.exception("a peer's %s failed", type(question).__name__)
        return wire.No(f"internal error: {type(error).__name__}")


class _Session:
    """One peer, and the owner of what it holds. Used by one thread."""

    def __init__(self, source: MoveServer, opened: Open) -> None:
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._source = source
        self._transfers = source.engine.transfers
        self._claim = opened.claim
        self._inventory = source.engine.locations[opened.claim.location]
        self._holdings: list[ChunkRef] = []
        self._allowed: frozenset[bytes] = frozenset()
        self._loans: dict[int, Sequence[ChunkDescriptor]] = {}
        self._offers: dict[int, list[tuple[Transport, bytes]]] = {}

    def welcome(self) -> Answer:
        """What the claim comes to."""
        claim = self._claim
        try:
            check_lookup(claim.tokens or b"")
            chosen = self._source.namespaces.chosen(claim.tokens, claim.model, claim.cache_salt)
        except (KitError, ValueError) as error:
            return wire.No(str(error))
        self._holdings = self._inventory.chunk_refs(chosen, claim.tokens)
        self._allowed = frozenset(holding.key for holding in self._holdings)
        return wire.Welcome(
            token=self.token,
            namespaces=self._source.namespaces.bases[-_MAX_NAMESPACES:],
            spaces=tuple(
                self._inventory.namespaces({holding.namespace for holding in self._holdings})
            ),
            transports=self._source.transports.addresses(),
            chunks=len(self._holdings),
            first=self._page(0),
            window_bytes=self._window_bytes(),
        )

    def answer(self, question: Question) -> Answer:
        """Each question in its turn."""
        answer: Answer = wire.Done()
        match question:
            case ListMore():
                answer = wire.Listing(self._page(question.start))
            case Lend():
                answer = self._lend(question)
            case Offer():
                answer = self._offer(question)
            case Recheck():
                dropped = self._transfers.recheck(question.keys)
                log.warning("peer %r found %d corrupt chunks", self._claim.destination, dropped)
            case GiveBack():
                self._end(question.lease)
            case Forget():
                answer = self._forget(question)
            case _:
                answer = wire.No(f"{type(question).__name__} has no place here")
        return answer

    def close(self) -> None:
        """Everything that was lent comes back."""
        for lease in list(self._loans):
            self._end(lease)

    def _window_bytes(self) -> int:
        """What comes from below memory has to find room there first."""
        engine = self._source.engine
        below = self._inventory is not engine
        return wire.window_bytes(len(engine.memory.memory)) if below else wire.WINDOW_BYTES

    def _page(self, start: int) -> tuple[ChunkRef, ...]:
        return tuple(self._holdings[start : start + MAX_HOLDINGS])

    def _lend(self, question: Lend) -> Answer:
        if not self._allowed.issuperset(question.keys):
            return wire.No("a chunk that the claim does not name")
        try:
            lease, parcels = self._raise_and_lend(question.keys)
        except KitError as error:
            return wire.No(str(error))
        if not lease:
            return wire.Lent(0, (), b"")
        self._loans[lease] = parcels
        answer = self._let_read(lease, question.transport, parcels)
        if isinstance(answer, wire.No):
            return answer
        return wire.Lent(lease, tuple(parcels), answer.offer)

    def _raise_and_lend(self, keys: Sequence[ChunkKey]) -> tuple[int, list[ChunkDescriptor]]:
        """What is in a tier below is lent from memory. Raises BackendError, and OperationFailed
        where memory has no room for it, also not after other peers had time to read theirs."""
        tiers = self._source.engine.lower_tiers
        if tiers is None:
            return self._transfers.lease(keys, self)
        deadline = time.monotonic() + ROOM_S
        while True:
            try:
                if tiers.promote(self._inventory, keys, self):
                    return self._transfers.lease(keys, self)
            finally:
                tiers.release(self)
            if time.monotonic() >= deadline:
                raise OperationFailed(
                    f"memory has no room for what is to be read from {self._inventory.location}"
                )
            time.sleep(AGAIN_S)

    def _offer(self, question: Offer) -> Answer:
        parcels = self._loans.get(question.lease, ())
        if any(not 0 <= number < len(parcels) for number in question.parcels):
            return wire.No("a parcel that was not lent")
        some = [parcels[number] for number in question.parcels]
        return self._let_read(question.lease, question.transport, some)

    def _let_read(
        self, lease: int, name: str, parcels: Sequence[ChunkDescriptor]
    ) -> wire.Offered | wire.No:
        transport = self._source.transports.get(name)
        if isinstance(transport, str):
            return wire.No(f"transport {name}: {transport}")
        offered = [
            ReadableRegion(Region(extent.offset, extent.nbytes), extent.checksum)
            for parcel in parcels
            for extent in parcel.extents
        ]
        try:
            offer = transport.offer(offered)
        except TransportError as error:
            return wire.No(str(error))
        self._offers.setdefault(lease, []).append((transport, offer))
        return wire.Offered(offer)

    def _forget(self, question: Forget) -> Answer:
        if self._claim.copy:
            return wire.No("a copy leaves its source as it is")
        if not self._allowed.issuperset(question.keys):
            return wire.No("a chunk that the claim does not name")
        return wire.HasForgotten(self._inventory.delete(question.keys))

    def _end(self, lease: int) -> None:
        """First nobody reads it any more, then it may go."""
        for transport, offer in self._offers.pop(lease, ()):
            transport.withdraw(offer)
        if self._loans.pop(lease, None) is not None:
            self._source.engine.release(lease, None)
