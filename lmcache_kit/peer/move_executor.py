"""The destination's side of moves, those between instances and those within one.

    open -> (receive a window into memory -> offload it where a tier is meant)* -> confirm -> delete

Copy and verify, hold a reference to each copy, wait until the controller knows the copies, and
only then delete at the source. A crash at any step leaves two copies, never none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.cache.descriptors import ChunkRef, DeleteResult
from lmcache_kit.errors import ControlError, InvalidQuery, KitError, UnknownName
from lmcache_kit.interfaces.operations import (
    Move,
    OperationListener,
    OperationStatus,
    Progress,
    Scope,
)
from lmcache_kit.keys import ChunkKey
from lmcache_kit.peer.local_source import LocalSource
from lmcache_kit.peer.move_source import MoveSource, MoveStats
from lmcache_kit.peer.priority import lower_priority
from lmcache_kit.peer.remote_source import PeerAccess, RemoteSource
from lmcache_kit.peer.report import Stopped, final_status
from lmcache_kit.peer.watchdog import Watchdog
from lmcache_kit.protocol import peer as wire

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.namespaces import NamespaceRegistry

log = logging.getLogger(__name__)

MAX_MOVES = 8
WINDOW_TOKENS = 1024 * 1024
CONFIRM_S = 15.0
RETRIES = 5
RETRY_S = 0.1
GRACE_S = 2.0
"""How long a move that is to end may take for the call that it is in, such as a write to a disk."""

Confirm = Callable[[str, float], bool]
"""Takes a location and a timeout in seconds; waits until the controller knows all that is there."""


@dataclass(frozen=True, slots=True)
class MoveContext:
    """What moves of this cache process work with.

    ``peers`` is None where it takes no part in moves between instances.
    """

    engine: CacheEngine
    namespaces: NamespaceRegistry
    confirm: Confirm
    peers: PeerAccess | None = None


class MoveExecutor:
    """Carries out up to ``MAX_MOVES`` moves at a time; others wait in a queue."""

    def __init__(self, context: MoveContext) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(
            MAX_MOVES, thread_name_prefix="lmcache-kit-move", initializer=lower_priority
        )
        self._moves: set[RunningMove] = set()
        self._watchdog = Watchdog("lmcache-kit-move-watchdog")

    def start(
        self, request: Move, *, deadline_s: float, listener: OperationListener
    ) -> RunningMove:
        """Start a move to a location of this cache process, without waiting for it.

        See :class:`~lmcache_kit.interfaces.operations.OperationExecutor`. Raises UnknownName for a
        location, InvalidQuery where source and destination are the same, and ControlError for a
        move from another instance where there is no access to peers.
        """
        tiers = self._context.engine.locations
        if request.location not in tiers:
            raise UnknownName("location", request.location, list(tiers))
        open_source = self._remote(request) if request.peer else self._local(request)
        move = RunningMove(
            self._context, request, open_source, deadline_s, listener, self._watchdog
        )
        self._moves.add(move)
        self._pool.submit(self._run, move)
        return move

    def close(self) -> None:
        """Cancel all moves and wait for their end. To be called before the engine's."""
        for move in list(self._moves):
            move.cancel()
        self._pool.shutdown()
        self._watchdog.close()

    def _run(self, move: RunningMove) -> None:
        try:
            move.run()
        finally:
            self._moves.discard(move)

    def _remote(self, request: Move) -> OpenSource:
        peers, peer, namespaces = self._context.peers, request.peer, self._context.namespaces
        if peers is None or peer is None:
            raise ControlError(
                "this cache process takes no part in moves",
                hint="Set enable_p2p in its configuration",
            )
        return lambda timeout_s: RemoteSource.open(
            peers, request, peer, namespaces=namespaces.bases, timeout_s=timeout_s
        )

    def _local(self, request: Move) -> LocalSource:
        engine = self._context.engine
        tiers = engine.locations
        if request.source_location not in tiers:
            raise UnknownName("location", request.source_location, list(tiers))
        if request.source_location == request.location:
            raise InvalidQuery("source and destination are the same")
        chosen = self._context.namespaces.chosen(request.tokens, request.model, request.cache_salt)
        return LocalSource(
            engine,
            tiers[request.source_location],
            tiers[request.location],
            namespaces=chosen,
            tokens=request.tokens,
        )


OpenSource = Callable[[float], MoveSource]
"""Opens a source within so many seconds. Raises KitError."""


class RunningMove:
    """One move, and the owner of its references to chunks until it has ended.

    ``source`` is known, or opened when the move begins.
    """

    def __init__(  # noqa: PLR0917 - one fact each
        self,
        context: MoveContext,
        request: Move,
        source: LocalSource | OpenSource,
        deadline_s: float,
        listener: OperationListener,
        watchdog: Watchdog,
    ) -> None:
        self._context = context
        self._watchdog = watchdog
        self._request = request
        self._open_source = source
        self._destination = context.engine.locations[request.location]
        self._deadline = time.monotonic() + deadline_s
        self._listener = listener
        self._cancelled = threading.Event()
        self._stats = MoveStats()
        self._source: MoveSource | None = None
        self._wanted: dict[ChunkKey, ChunkRef] = {}
        self._deleted = DeleteResult()
        self._why = ""
        self._ran = False
        self._finished = False
        self._lock = threading.Lock()
        if isinstance(source, LocalSource):
            self.accept(source)
        self._finish_after(deadline_s + GRACE_S)

    def cancel(self) -> None:
        """See :class:`~lmcache_kit.interfaces.operations.RunningOperation`."""
        self._cancelled.set()
        if source := self._source:
            source.abort()
        self._finish_after(GRACE_S)

    def run(self) -> None:
        """Carry the move out and report its end."""
        try:
            self._move()
        except KitError as error:
            self._why = str(error)
        # The thread's boundary: whatever went wrong, the operation is to end and say so.
        except Exception as error:
            log.exception("a move from %s failed", self._request.source)
            self._why = f"{type(error).__name__}: {error}"
        finally:
            self._context.engine.memory_tier.references.release(self)
            self._destination.references.release(self)
            if self._source:
                self._source.close()
            self._ran = True
            self._end()

    def open(self) -> MoveSource:
        """Open a source that was not known from the start."""
        assert not isinstance(self._open_source, LocalSource)
        return self._open_source(self._left_s())

    def accept(self, source: MoveSource) -> None:
        """Take note of the source, and report what there is to move."""
        self._source = source
        self._wanted = {chunk.key: chunk for chunk in source.chunks}
        if not self._finished:
            tokens = sum([chunk.tokens for chunk in source.chunks])
            self._listener.accepted(Scope(tokens, len(source.chunks)))

    def _move(self) -> None:
        self._check()
        if self._source is None:
            self.accept(self.open())
        source = self._source
        assert source is not None
        self._tell_progress()
        if not self._wanted:
            return
        self._receive_all(source)
        source.end_receiving()
        if not self._request.copy:
            self._hand_over(source)

    def _receive_all(self, source: MoveSource) -> None:
        for window in self._windows(source, source.chunks):
            self._receive(source, window)
            if self._stats.full:
                return
        for _ in range(RETRIES):
            retry, self._stats.retry = self._stats.retry, []
            if not retry:
                return
            memory = self._context.engine.memory_tier
            memory.wait_until_stored(retry, min(RETRY_S, self._left_s()))
            for window in self._windows(source, [self._wanted[key] for key in retry]):
                self._receive(source, window)

    def _receive(self, source: MoveSource, window: Sequence[ChunkKey]) -> None:
        """Have the chunks of one window at the destination, by way of memory."""
        self._check()
        stats, destination, engine = self._stats, self._destination, self._context.engine
        wanted = destination.references.acquire(window, self)
        absent = set(wanted)
        stats.add_present([key for key in window if key not in absent])
        if wanted:
            source.receive(wanted, owner=self, stats=stats, timeout_s=self._left_s())
        if destination is not engine.memory_tier:
            self._offload([key for key in wanted if key in stats.arrived])
        self._tell_progress()

    def _offload(self, keys: Sequence[ChunkKey]) -> None:
        """Write chunks from memory to the tier that they are meant for."""
        destination, tiers = self._destination, self._context.engine.lower_tiers
        assert tiers is not None
        try:
            tiers.offload(destination, keys, self)
        finally:
            for key in destination.references.acquire(keys, self):
                del self._stats.arrived[key]
                self._stats.failures[f"{destination.location} did not take it"] += 1

    def _windows(self, source: MoveSource, chunks: Sequence[ChunkRef]) -> Iterator[list[ChunkKey]]:
        """Cut chunks into windows that memory has room for."""
        memory = self._context.engine.memory.memory
        most_bytes = min(source.window_bytes, wire.window_bytes(len(memory)))
        window, nbytes, tokens = list[ChunkKey](), 0, 0
        for chunk in chunks:
            size = source.chunk_size(chunk.namespace)
            nbytes += chunk.nbytes
            tokens += size
            too_much = nbytes > most_bytes or tokens > WINDOW_TOKENS
            if window and (too_much or len(window) >= wire.MAX_LEASED):
                yield window
                window, nbytes, tokens = [], chunk.nbytes, size
            window.append(chunk.key)
        if window:
            yield window

    def _hand_over(self, source: MoveSource) -> None:
        """Delete at the source what the controller knows to be here."""
        arrived = partial(self._destination.references.findable, self, self._wanted)
        if not arrived():
            return
        self._check()
        if not self._context.confirm(self._request.location, min(CONFIRM_S, self._left_s())):
            raise ControlError("the controller did not confirm it in time, so the source keeps all")
        # Asked again: a chunk that was dropped here since must stay there. Chunks that were
        # refused here, and those behind them, are not among these. Children go before parents.
        keys = arrived()[::-1]
        for start in range(0, len(keys), wire.MAX_LISTED):
            self._check()
            some = source.delete(keys[start : start + wire.MAX_LISTED])
            self._deleted = DeleteResult(*(a + b for a, b in zip(self._deleted, some, strict=True)))

    def _check(self) -> None:
        """Raise ControlError when the move is cancelled, or its deadline has passed."""
        if self._cancelled.is_set():
            raise ControlError("cancelled")
        if time.monotonic() >= self._deadline:
            raise ControlError("its time was over")

    def _left_s(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _tell_progress(self) -> None:
        if not self._finished:
            self._listener.progressed(self._progress())

    def _progress(self) -> Progress:
        transfer = self._source.transfer(self._stats) if self._source else None
        return Progress(len(self._stats.arrived), len(self._wanted), transfer=transfer)

    def _finish_after(self, seconds: float) -> None:
        """End the operation even if the move hangs in a call; it does nothing more after that."""
        with self._lock:
            if not self._finished:
                self._watchdog.watch(self, seconds, self._end)

    def _end(self) -> None:
        """Report the end, once."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            self._watchdog.drop(self)
            ended = self._status()
        self._listener.ended(ended)
        transfer = ended.progress.transfer
        log.log(
            logging.INFO if ended.state == "done" else logging.WARNING,
            "%s of %d tokens from %s of instance %r%s: %s%s",
            f"operation {self._request.peer.operation_id}, move" if self._request.peer else "move",
            ended.tokens,
            self._request.source_location,
            self._request.source,
            f" by {transfer.transport} ({transfer.description})" if transfer else "",
            ended.state,
            f", {ended.message}" if ended.message else "",
        )

    def _status(self) -> OperationStatus:
        arrived, why = self._stats.arrived, self._why
        stopped: Stopped = ""
        unfinished = why or not self._ran
        if unfinished and self._cancelled.is_set():
            stopped, why = "cancelled", ""
        elif unfinished and time.monotonic() >= self._deadline:
            stopped, why = "expired", why or "its time was over"
        return final_status(
            sum([chunk.tokens for key, chunk in self._wanted.items() if key in arrived]),
            self._progress(),
            self._stats,
            why=why,
            stopped=stopped,
            incompatible=self._source.incompatible if self._source else {},
            deleted=self._deleted,
        )
