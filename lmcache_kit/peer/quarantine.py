"""Quarantine for memory that a transfer past its deadline may still write to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lmcache_kit.cache.memory.transfers import Transfers

log = logging.getLogger(__name__)

SWEEP_S = 0.1


class _Unsettled(NamedTuple):
    transport: str
    settled: Callable[[], bool]
    tickets: Sequence[int]
    nbytes: int


class Quarantine:
    """Holds reservations of failed reads until their transport says that they have settled.

    Some transports cannot cancel a transfer: after a timeout its bytes may still arrive. Memory
    that they may arrive in is used for nothing else until then. A transport with ``cap_bytes`` or
    more in quarantine is blocked until some of it has settled.
    """

    def __init__(self, transfers: Transfers, cap_bytes: int) -> None:
        self._transfers = transfers
        self._cap_bytes = cap_bytes
        self._unsettled: list[_Unsettled] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """The memory in quarantine."""
        return sum(each.nbytes for each in self._unsettled)

    def blocked(self, transport: str) -> str:
        """Return why a transport must not be used now; empty if it may be."""
        nbytes = sum(each.nbytes for each in self._unsettled if each.transport == transport)
        if nbytes < self._cap_bytes:
            return ""
        return f"{nbytes} bytes of transfers past their deadline have not settled yet"

    def add(self, transport: str, settled: Callable[[], bool], tickets: Sequence[int]) -> None:
        """Take over the reservations with these tickets; ``settled`` says when to free them."""
        nbytes = sum([self._transfers.quarantine(ticket) for ticket in tickets])
        log.warning(
            "%d bytes may still be written by %s; they are in quarantine", nbytes, transport
        )
        with self._changed:
            self._unsettled.append(_Unsettled(transport, settled, tickets, nbytes))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._sweep, name="lmcache-kit-quarantine", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the sweep. Memory that is still here must not be used again by this process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _sweep(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsettled or self._closed)
                if self._closed:
                    return
                unsettled = list(self._unsettled)
            settled = [each for each in unsettled if self._has_settled(each)]
            for each in settled:
                for ticket in each.tickets:
                    self._transfers.abort(ticket)
            with self._changed:
                self._unsettled = [each for each in self._unsettled if each not in settled]
                self._changed.wait_for(lambda: self._closed, SWEEP_S)

    @staticmethod
    def _has_settled(each: _Unsettled) -> bool:
        try:
            return each.settled()
        # A transport is a plugin and may raise anything: then nothing has settled.
        except Exception:
            log.exception("transport %s cannot say whether a transfer has settled", each.transport)
            return False
