"""Carries out the control plane's orders on the engine of this process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.cache.records import Selected
from lmcache_kit.cache.tiers.store_tier import StoreTier
from lmcache_kit.cache.validation import check_lookup
from lmcache_kit.errors import ControlError, InvalidQuery, KitError, UnknownName
from lmcache_kit.interfaces.operations import (
    Accepted,
    Clear,
    Compress,
    Decompress,
    Job,
    ListPins,
    Move,
    Operator,
    Order,
    Outcome,
    Pin,
    Progress,
    Unpin,
)
from lmcache_kit.peer.local_move import Confirm, LocalMove
from lmcache_kit.service.codecs import encoding_threads
from lmcache_kit.service.jobs import RecodeJob

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.memory.transcoding import Transcoded
    from lmcache_kit.cache.tier_base import Tier
    from lmcache_kit.keys import ChunkKey
    from lmcache_kit.peer.move_executor import MoveExecutor
    from lmcache_kit.service.codecs import Codecs

Report = Callable[[Progress], None]
Finish = Callable[[Outcome], None]


class FinishedJob:
    """A job that was over when it began."""

    def __init__(self, selected: Selected) -> None:
        self.accepted = Accepted(selected.tokens, selected.chunks)

    def cancel(self) -> None:
        """Too late."""


class PendingJob:
    """A job that ends when a store has answered; it cannot be stopped."""

    def __init__(self) -> None:
        self.selected: Selected | None = None

    @property
    def accepted(self) -> Accepted | None:
        """What it is about, once that is known."""
        return self.selected and Accepted(self.selected.tokens, self.selected.chunks)

    def cancel(self) -> None:
        """It goes on."""


class EngineOperator(Operator):
    """Orders name namespaces by salt and model; ``namespaces`` are those that workers registered.

    ``pin_ttl_s``: of pins that do not say how long they last. ``mover``: of moves; without one
    those from other instances are refused. ``confirm`` waits for so many seconds until the
    controller knows all that is at a location.
    """

    def __init__(
        self,
        engine: CacheEngine,
        codecs: Codecs,
        *,
        namespaces: NamespaceRegistry,
        pin_ttl_s: float | None = None,
        mover: MoveExecutor | None = None,
        confirm: Confirm = lambda location, timeout_s: False,
    ) -> None:
        self._engine = engine
        self._codecs = codecs
        self._pin_ttl_s = pin_ttl_s
        self._width = encoding_threads()
        self._pool = ThreadPoolExecutor(self._width, thread_name_prefix="lmcache-kit-order")
        self._jobs: weakref.WeakSet[RecodeJob] = weakref.WeakSet()
        self._namespaces = namespaces
        self._mover = mover
        self._confirm = confirm

    def close(self) -> None:
        """Cancel what runs, and wait for the chunks at work. To be called before the engine's."""
        for job in list(self._jobs):
            job.cancel()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, order: Order, *, deadline_s: float, report: Report, finish: Finish) -> Job:
        """See :class:`~lmcache_kit.interfaces.operations.Operator`."""
        inventories = self._engine.locations
        if order.location not in inventories:
            raise UnknownName("location", order.location, list(inventories))
        inventory = inventories[order.location]
        if isinstance(order, Move) and order.peer is None:
            return self._shift(inventory, order, deadline_s, report, finish)
        if isinstance(order, Move):
            if self._mover is None:
                raise ControlError(
                    "this cache process takes no part in moves",
                    hint="Set enable_p2p in its configuration",
                )
            return self._mover.begin(order, deadline_s=deadline_s, report=report, finish=finish)
        namespaces = self._namespaces.chosen(order.tokens, order.model, order.cache_salt)
        try:
            check_lookup(order.tokens or b"")
            if isinstance(order, Compress | Decompress):
                return self._recode(inventory, order, namespaces, deadline_s, report, finish)
            if isinstance(order, Clear) and isinstance(inventory, StoreTier):
                return self._clear_store(inventory, order, namespaces, finish)
            selected, outcome = self._at_once(inventory, order, namespaces)
        except ValueError as error:
            raise InvalidQuery(str(error)) from error
        finish(outcome)
        return FinishedJob(selected)

    def _at_once(
        self, inventory: Tier, order: Order, namespaces: list[bytes] | None
    ) -> tuple[Selected, Outcome]:
        match order:
            case Pin():
                return self._pin(inventory, order, namespaces)
            case Unpin():
                freed = inventory.unpin(namespaces, order.tokens, order.pin_id)
                message = "" if freed.chunks else "there was no such pin"
                return freed, _done(freed, message)
            case Clear():
                return _clear(inventory, order, namespaces)
            case ListPins():
                pins = tuple(inventory.pins())
                return Selected(), Outcome("done", pins=pins)
            case _:
                raise AssertionError(order)

    def _pin(
        self, inventory: Tier, order: Pin, namespaces: list[bytes] | None
    ) -> tuple[Selected, Outcome]:
        ttl_s = self._pin_ttl_s if order.ttl_s is None else order.ttl_s
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be over 0")
        there, pinned = inventory.pin(
            namespaces,
            order.tokens,
            order.pin_id,
            owner=order.owner,
            ttl_s=ttl_s,
        )
        message = "" if there.chunks else "nothing of this is stored"
        if pinned.chunks < there.chunks:
            message = (
                f"pinned {pinned.tokens} of {there.tokens} tokens: all pins together may hold "
                f"{inventory.pin_budget_bytes} bytes (max_pinned_share)"
            )
        return pinned, Outcome(
            "partial" if pinned.chunks < there.chunks else "done",
            pinned.tokens,
            _progress(pinned, there),
            message,
            tuple(pin for pin in inventory.pins() if pin.pin_id == order.pin_id),
        )

    def _clear_store(
        self, tier: StoreTier, order: Clear, namespaces: list[bytes] | None, finish: Finish
    ) -> Job:
        """As :func:`_clear`, where the store may take its time."""
        job = PendingJob()

        def run() -> None:
            try:
                job.selected, outcome = _clear(tier, order, namespaces)
            except KitError as error:
                outcome = Outcome("failed", message=str(error))
            finish(outcome)

        self._pool.submit(run)
        return job

    def _recode(  # noqa: PLR0917 - what begin was told
        self,
        inventory: Tier,
        order: Compress | Decompress,
        namespaces: list[bytes] | None,
        deadline_s: float,
        report: Report,
        finish: Finish,
    ) -> Job:
        method = order.method
        if method not in self._codecs.names:
            raise UnknownName("method", method, self._codecs.names)
        encodes = isinstance(order, Compress)
        job = RecodeJob(
            inventory.keys(namespaces, order.tokens),
            partial(partial(self._pack, inventory) if encodes else inventory.decode, method=method),
            done_word=f"encoded with {method}" if encodes else "raw",
            report=report,
            finish=finish,
        )
        self._jobs.add(job)
        job.start(self._pool, self._width, deadline_s)
        return job

    def _shift(
        self, goal: Tier, order: Move, deadline_s: float, report: Report, finish: Finish
    ) -> Job:
        inventories, tiers = self._engine.locations, self._engine.lower_tiers
        source = inventories.get(order.source_location)
        if source is None or tiers is None:
            raise UnknownName("location", order.source_location, list(inventories))
        if source is goal:
            raise InvalidQuery("source and destination are the same")
        namespaces = self._namespaces.chosen(order.tokens, order.model, order.cache_salt)
        holdings = source.chunk_refs(namespaces, order.tokens)
        shift = LocalMove(tiers, source, goal, holdings, copy=order.copy, confirm=self._confirm)
        job = RecodeJob(
            [(holding.key, holding.tokens) for holding in holdings],
            shift.shift,
            done_word="there",
            report=report,
            finish=lambda outcome: finish(shift.end(outcome)),
        )
        self._jobs.add(job)
        job.start(self._pool, 1, deadline_s)
        return job

    def _pack(self, inventory: Tier, key: ChunkKey, method: str) -> Transcoded:
        return inventory.encode(key, method, self._codecs.get(method))


def _clear(
    inventory: Tier, order: Clear, namespaces: list[bytes] | None
) -> tuple[Selected, Outcome]:
    gone, kept = inventory.clear(namespaces, order.tokens, force=order.force)
    message = f"{kept.tokens} tokens stay because they are pinned" if kept.chunks else ""
    return gone, _done(gone, message or ("" if gone.chunks else "nothing of this is stored"))


def _done(selected: Selected, message: str) -> Outcome:
    return Outcome("done", selected.tokens, _progress(selected, selected), message)


def _progress(done: Selected, there: Selected) -> Progress:
    return Progress(done.chunks, there.chunks, done.nbytes, done.nbytes)
