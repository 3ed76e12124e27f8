"""The operations of a cache process: a table from request to the handler that carries it out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.cache.records import Selected
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.cache.validation import check_lookup
from lmcache_kit.errors import InvalidQuery, KitError, UnknownName
from lmcache_kit.interfaces.operations import (
    Clear,
    Compress,
    Decompress,
    ListPins,
    Move,
    OperationListener,
    OperationRequest,
    OperationStatus,
    Pin,
    Progress,
    RunningOperation,
    Scope,
    Unpin,
)
from lmcache_kit.service.chunk_operation import ChunkOperation
from lmcache_kit.service.codecs import encoding_threads

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.records import Transcoded
    from lmcache_kit.cache.tier import Tier
    from lmcache_kit.keys import ChunkKey
    from lmcache_kit.peer.move_executor import MoveExecutor
    from lmcache_kit.service.codecs import Codecs


class _Call(NamedTuple):
    """The tier of a request, its deadline, and the listener of its operation."""

    tier: Tier
    deadline_s: float
    listener: OperationListener

    def finish(self, selected: Selected, status: OperationStatus) -> None:
        """Accept an operation that is over already, and end it."""
        self.listener.accepted(Scope(selected.tokens, selected.chunks))
        self.listener.ended(status)


class EngineExecutor:
    """An :class:`~lmcache_kit.interfaces.operations.OperationExecutor` over a cache engine.

    Requests name namespaces by salt and model, among those that workers registered in
    ``namespaces``. ``moves`` carries out moves. ``pin_ttl_s`` is the time of pins that name none.
    """

    def __init__(
        self,
        engine: CacheEngine,
        codecs: Codecs,
        *,
        namespaces: NamespaceRegistry,
        moves: MoveExecutor,
        pin_ttl_s: float | None = None,
    ) -> None:
        self._engine = engine
        self._codecs = codecs
        self._pin_ttl_s = pin_ttl_s
        self._width = encoding_threads()
        self._pool = ThreadPoolExecutor(self._width, thread_name_prefix="lmcache-kit-operation")
        self._running: weakref.WeakSet[ChunkOperation] = weakref.WeakSet()
        self._namespaces = namespaces
        self._moves = moves
        self._handlers: dict[type, Callable[..., RunningOperation | None]] = {
            Pin: self._pin,
            Unpin: self._unpin,
            ListPins: self._list_pins,
            Clear: self._clear,
            Compress: self._transcode,
            Decompress: self._transcode,
            Move: self._move,
        }

    def close(self) -> None:
        """Cancel what runs, and wait for the chunks under way. Close the engine after this."""
        for operation in list(self._running):
            operation.cancel()
        self._pool.shutdown(cancel_futures=True)

    def start(
        self, request: OperationRequest, *, deadline_s: float, listener: OperationListener
    ) -> RunningOperation | None:
        """Hand a request to its handler. Errors of the engine's checks become InvalidQuery."""
        tiers = self._engine.locations
        if request.location not in tiers:
            raise UnknownName("location", request.location, list(tiers))
        call = _Call(tiers[request.location], deadline_s, listener)
        try:
            return self._handlers[type(request)](request, call)
        except ValueError as error:
            if isinstance(error, KitError):
                raise
            raise InvalidQuery(str(error)) from error

    def _pin(self, request: Pin, call: _Call) -> None:
        ttl_s = self._pin_ttl_s if request.ttl_s is None else request.ttl_s
        if ttl_s is not None and not ttl_s > 0:
            raise InvalidQuery(f"ttl_s is {ttl_s}; it must be over 0")
        stored, pinned = call.tier.pin(
            self._selected_namespaces(request),
            request.tokens,
            request.pin_id,
            owner=request.owner,
            ttl_s=ttl_s,
        )
        message = "" if stored.chunks else "nothing of this is stored"
        if pinned.chunks < stored.chunks:
            message = (
                f"pinned {pinned.tokens} of {stored.tokens} tokens: all pins together may hold "
                f"{call.tier.pin_budget_bytes} bytes (max_pinned_share)"
            )
        status = OperationStatus(
            "partial" if pinned.chunks < stored.chunks else "done",
            pinned.tokens,
            _progress(pinned, stored),
            message,
            tuple(pin for pin in call.tier.pins() if pin.pin_id == request.pin_id),
        )
        call.finish(pinned, status)

    def _unpin(self, request: Unpin, call: _Call) -> None:
        namespaces = self._selected_namespaces(request)
        freed = call.tier.unpin(namespaces, request.tokens, request.pin_id)
        call.finish(freed, _done(freed, "" if freed.chunks else "there was no such pin"))

    def _list_pins(self, request: ListPins, call: _Call) -> None:
        self._selected_namespaces(request)
        call.finish(Selected(), OperationStatus("done", pins=tuple(call.tier.pins())))

    def _clear(self, request: Clear, call: _Call) -> None:
        """Clear memory at once, and a store in the pool, because a store may take its time."""
        clear = partial(_clear, call, request, self._selected_namespaces(request))
        if not isinstance(call.tier, StoreTier):
            clear()
            return

        def run() -> None:
            try:
                clear()
            except KitError as error:
                call.listener.ended(OperationStatus("failed", message=str(error)))

        self._pool.submit(run)

    def _transcode(self, request: Compress | Decompress, call: _Call) -> ChunkOperation:
        namespaces, method = self._selected_namespaces(request), request.method
        if method not in self._codecs.names:
            raise UnknownName("method", method, self._codecs.names)
        encodes = isinstance(request, Compress)
        work = partial(self._encode, call.tier) if encodes else call.tier.decode
        operation = ChunkOperation(
            call.tier.keys(namespaces, request.tokens),
            partial(work, method=method),
            done_word=f"encoded with {method}" if encodes else "raw",
            listener=call.listener,
        )
        return self._run(operation, self._width, call.deadline_s)

    def _move(self, request: Move, call: _Call) -> RunningOperation:
        return self._moves.start(request, deadline_s=call.deadline_s, listener=call.listener)

    def _run(self, operation: ChunkOperation, width: int, deadline_s: float) -> ChunkOperation:
        self._running.add(operation)
        operation.start(self._pool, width, deadline_s)
        return operation

    def _selected_namespaces(self, request: OperationRequest) -> list[bytes] | None:
        """Return the namespaces that a request means; None for all. Raise UnknownName.

        Raise ValueError for tokens that are malformed.
        """
        namespaces = self._namespaces.chosen(request.tokens, request.model, request.cache_salt)
        check_lookup(request.tokens or b"")
        return namespaces

    def _encode(self, tier: Tier, key: ChunkKey, method: str) -> Transcoded:
        return tier.encode(key, method, self._codecs.get(method))


def _clear(call: _Call, request: Clear, namespaces: list[bytes] | None) -> None:
    gone, kept = call.tier.clear(namespaces, request.tokens, force=request.force)
    message = "" if gone.chunks else "nothing of this is stored"
    if kept.chunks:
        message = f"{kept.tokens} tokens stay because they are pinned"
    call.finish(gone, _done(gone, message))


def _done(selected: Selected, message: str) -> OperationStatus:
    return OperationStatus("done", selected.tokens, _progress(selected, selected), message)


def _progress(done: Selected, stored: Selected) -> Progress:
    return Progress(done.chunks, stored.chunks, done.nbytes, done.nbytes)
