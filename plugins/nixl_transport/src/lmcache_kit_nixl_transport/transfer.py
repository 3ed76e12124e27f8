"""A READ that NIXL was asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lmcache_kit.errors import TransportError

CLOSED = "this transport is closed"


class AgentClosed(TransportError):
    """Said of nothing in particular: our own end."""


class Transfer:
    """Any thread may look at it; ``step`` calls NIXL and says whether it is over.

    It stays with its agent until it is over: NIXL writes into our memory until then, whatever
    becomes of the handle. ``abandoned``: nobody waits for it, the agent has to look.
    """

    def __init__(self, peer: str, handle: Any) -> None:
        self.peer = peer
        self.handle = handle
        self.abandoned = False
        self._lock = threading.Lock()
        self._over = False
        self._failure = ""

    def advance(self, step: Callable[[Any], bool]) -> bool:
        """All has landed. Raises TransportError if it failed, and then nothing lands any more."""
        with self._lock:
            if not self._over and self.handle is not None:
                try:
                    self._over = step(self.handle)
                except AgentClosed:
                    raise
                except TransportError as error:
                    self._over = True
                    self._failure = error.message
            if self._over:
                self._release()
            if self._failure:
                raise TransportError(self._failure)
            if self.handle is None and not self._over:
                raise AgentClosed(CLOSED)
            return self._over

    @property
    def over(self) -> bool:
        """It has landed or failed, as far as was looked."""
        return self._over

    @property
    def complete(self) -> bool:
        """It has landed, as far as was looked."""
        return self._over and not self._failure

    def detach(self) -> None:
        """Let go of NIXL, which is about to end."""
        with self._lock:
            self._release()

    def end(self) -> None:
        """NIXL has ended; what had not landed never will."""
        with self._lock:
            if not self._over:
                self._over, self._failure = True, CLOSED

    def _release(self) -> None:
        handle, self.handle = self.handle, None
        if handle is None:
            return
        try:
            handle.release()
        except Exception:  # noqa: BLE001 - whatever NIXL has against it, the transfer is over
            handle._released = True
        handle._agent = None  # it would keep NIXL from ending where a traceback keeps the handle
