"""Carries out the control plane's orders on the engine of this process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from lmcache_kit.cache.checks import check_lookup
from lmcache_kit.cache.records import Selected
from lmcache_kit.errors import InvalidQuery, UnknownName
from lmcache_kit.interfaces.operations import (
    Accepted,
    Clear,
    Compress,
    Decompress,
    Job,
    ListPins,
    Operator,
    Order,
    Outcome,
    Pin,
    Progress,
    Unpin,
)
from lmcache_kit.process.codecs import encoding_threads
from lmcache_kit.process.jobs import RecodeJob

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.cache.packing import Recoded
    from lmcache_kit.keys import ChunkKey, Namespace
    from lmcache_kit.process.codecs import Codecs

Report = Callable[[Progress], None]
Finish = Callable[[Outcome], None]


class DoneAtOnce:
    """A job that was over when it began."""

    def __init__(self, selected: Selected) -> None:
        self.accepted = Accepted(selected.tokens, selected.chunks)

    def cancel(self) -> None:
        """Too late."""


class EngineOperator(Operator):
    """Orders name namespaces by salt and model; it knows those that workers registered.

    ``pin_ttl_s``: of pins that do not say how long they last.
    """

    def __init__(
        self, engine: CacheEngine, codecs: Codecs, *, pin_ttl_s: float | None = None
    ) -> None:
        self._engine = engine
        self._codecs = codecs
        self._pin_ttl_s = pin_ttl_s
        self._width = encoding_threads()
        self._pool = ThreadPoolExecutor(self._width, thread_name_prefix="lmcache-kit-order")
        self._jobs: weakref.WeakSet[RecodeJob] = weakref.WeakSet()
        self._namespaces: dict[Namespace, None] = {}

    def register_namespace(self, namespace: Namespace) -> None:
        """Chunks are stored under this base namespace."""
        self._namespaces = {**self._namespaces, namespace: None}

    def close(self) -> None:
        """Cancel what runs, and wait for the chunks at work. To be called before the engine's."""
        for job in list(self._jobs):
            job.cancel()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, order: Order, *, deadline_s: float, report: Report, finish: Finish) -> Job:
        """See :class:`~lmcache_kit.interfaces.operations.Operator`."""
        if order.location != self._engine.location:
            raise UnknownName("location", order.location, [self._engine.location])
        namespaces = self._chosen(order)
        try:
            check_lookup(order.tokens or b"")
            if isinstance(order, Compress | Decompress):
                return self._recode(order, namespaces, deadline_s, report, finish)
            selected, outcome = self._at_once(order, namespaces)
        except ValueError as error:
            raise InvalidQuery(str(error)) from error
        finish(outcome)
        return DoneAtOnce(selected)

    def _chosen(self, order: Order) -> list[bytes] | None:
        """Digests of the namespaces that an order is about; None for all."""
        if order.tokens is None and order.model is None and not order.cache_salt:
            return None
        bases = list(self._namespaces)
        if order.model is not None:
            known = sorted({base.model for base in bases})
            if order.model not in known:
                raise UnknownName("model", order.model, known)
            bases = [base for base in bases if base.model == order.model]
        return [base.variant(cache_salt=order.cache_salt).digest for base in bases]

    def _at_once(self, order: Order, namespaces: list[bytes] | None) -> tuple[Selected, Outcome]:
        match order:
            case Pin():
                return self._pin(order, namespaces)
            case Unpin():
                freed = self._engine.unpin(namespaces, order.tokens, order.pin_id)
                message = "" if freed.chunks else "there was no such pin"
                return freed, _done(freed, message)
            case Clear():
                return self._clear(order, namespaces)
            case ListPins():
                pins = tuple(self._engine.pins())
                return Selected(), Outcome("done", pins=pins)
            case _:
                raise AssertionError(order)

    def _pin(self, order: Pin, namespaces: list[bytes] | None) -> tuple[Selected, Outcome]:
        ttl_s = self._pin_ttl_s if order.ttl_s is None else order.ttl_s
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be over 0")
        there, pinned = self._engine.pin(
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
                f"{self._engine.pin_budget_bytes} bytes (max_pinned_share)"
            )
        return pinned, Outcome(
            "partial" if pinned.chunks < there.chunks else "done",
            pinned.tokens,
            _progress(pinned, there),
            message,
            tuple(pin for pin in self._engine.pins() if pin.pin_id == order.pin_id),
        )

    def _clear(self, order: Clear, namespaces: list[bytes] | None) -> tuple[Selected, Outcome]:
        gone, kept = self._engine.clear(namespaces, order.tokens, force=order.force)
        message = f"{kept.tokens} tokens stay because they are pinned" if kept.chunks else ""
        return gone, _done(gone, message or ("" if gone.chunks else "nothing of this is stored"))

    def _recode(
        self,
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
            self._engine.keys(namespaces, order.tokens),
            partial(self._pack if encodes else self._engine.unpack, method=method),
            done_word=f"encoded with {method}" if encodes else "raw",
            report=report,
            finish=finish,
        )
        self._jobs.add(job)
        job.start(self._pool, self._width, deadline_s)
        return job

    def _pack(self, key: ChunkKey, method: str) -> Recoded:
        return self._engine.pack(key, method, self._codecs.get(method))


def _done(selected: Selected, message: str) -> Outcome:
    return Outcome("done", selected.tokens, _progress(selected, selected), message)


def _progress(done: Selected, there: Selected) -> Progress:
    return Progress(done.chunks, there.chunks, done.nbytes, done.nbytes)
