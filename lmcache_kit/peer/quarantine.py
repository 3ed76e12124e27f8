"""Memory that bytes may still land in although nobody waits for them any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lmcache_kit.cache.memory.transfers import Transfers

log = logging.getLogger(__name__)

SWEEP_S = 0.1


class _Case(NamedTuple):
    transport: str
    settled: Callable[[], bool]
    tickets: Sequence[int]
    nbytes: int


class Quarantine:
    """Keeps parcels that will not come until their transport says that nothing of them can.

    A transport that has ``cap_bytes`` or more here is blocked until some of it has settled.
    """

    def __init__(self, transfers: Transfers, cap_bytes: int) -> None:
        self._transfers = transfers
        self._cap_bytes = cap_bytes
        self._cases: list[_Case] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """How much memory waits."""
        return sum(case.nbytes for case in self._cases)

    def blocked(self, transport: str) -> str:
        """Why a transport must not be used now; empty if it may."""
        nbytes = sum(case.nbytes for case in self._cases if case.transport == transport)
        if nbytes < self._cap_bytes:
            return ""
        return f"{nbytes} bytes of transfers that came to their deadline have not settled yet"

    def add(self, transport: str, settled: Callable[[], bool], tickets: Sequence[int]) -> None:
        """Take these parcels over."""
        nbytes = sum([self._transfers.quarantine(ticket) for ticket in tickets])
        log.warning("%d bytes may still come by %s; they are kept apart", nbytes, transport)
        with self._changed:
            self._cases.append(_Case(transport, settled, tickets, nbytes))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._sweep, name="lmcache-kit-quarantine", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop to look after them. Their memory is not to be used again by this process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _sweep(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._cases or self._closed)
                if self._closed:
                    return
                cases = list(self._cases)
            over = [case for case in cases if self._is_over(case)]
            for case in over:
                for ticket in case.tickets:
                    self._transfers.abort(ticket)
            with self._changed:
                self._cases = [case for case in self._cases if case not in over]
                self._changed.wait_for(lambda: self._closed, SWEEP_S)

    @staticmethod
    def _is_over(case: _Case) -> bool:
        try:
            return case.settled()
        # A transport is somebody's plugin: while it does not say so, nothing has settled.
        except Exception:
            log.exception("transport %s cannot say whether a transfer has settled", case.transport)
            return False
