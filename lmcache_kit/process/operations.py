"""Carries out the control plane's orders on the engine of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcache_kit.cache.records import Selected
from lmcache_kit.errors import ControlError, InvalidQuery, UnknownName
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

if TYPE_CHECKING:
    from lmcache_kit.cache.engine import CacheEngine
    from lmcache_kit.keys import Namespace
    from lmcache_kit.plugins import Plugins

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
        self, engine: CacheEngine, plugins: Plugins, *, pin_ttl_s: float | None = None
    ) -> None:
        self._engine = engine
        self._pin_ttl_s = pin_ttl_s
        self._plugins = plugins
        self._namespaces: dict[Namespace, None] = {}

    def register_namespace(self, namespace: Namespace) -> None:
        """Chunks are stored under this base namespace."""
        self._namespaces = {**self._namespaces, namespace: None}

    def begin(self, order: Order, *, deadline_s: float, report: Report, finish: Finish) -> Job:
        """See :class:`~lmcache_kit.interfaces.operations.Operator`."""
        if order.location != self._engine.location:
            raise UnknownName("location", order.location, [self._engine.location])
        namespaces = self._chosen(order)
        try:
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
        there, pinned = self._engine.pin(
            namespaces,
            order.tokens,
            order.pin_id,
            owner=order.owner,
            ttl_s=self._pin_ttl_s if order.ttl_s is None else order.ttl_s,
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
        known = sorted({offer.spec.name for offer in self._plugins.specs("codec")})
        if order.method not in known:
            raise UnknownName("method", order.method, known)
        raise ControlError("compress and decompress are not served yet")


def _done(selected: Selected, message: str) -> Outcome:
    return Outcome("done", selected.tokens, _progress(selected, selected), message)


def _progress(done: Selected, there: Selected) -> Progress:
    return Progress(done.chunks, there.chunks, done.nbytes, done.nbytes)
