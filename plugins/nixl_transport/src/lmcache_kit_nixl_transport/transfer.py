"""A READ transfer of NIXL, from its begin to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from lmcache_kit.errors import TransportError

CLOSED = "this transport is closed"


class AgentClosed(TransportError):
    """The agent of this process was closed."""


class Transfer:
    """State of a transfer; any thread may poll it.

    States: in flight, then finished, by success or by failure. NIXL writes into this process's
    memory until the transfer is finished, even after the handle was released; so the agent keeps it
    until then. ``abandoned``: no reader waits for it, and the agent polls it.
    """

    def __init__(self, peer: str, handle: Any) -> None:
        self.peer = peer
        self.handle = handle
        self.abandoned = False
        self._lock = threading.Lock()
        self._finished = False
        self._failure = ""

    def advance(self, step: Callable[[Any], bool]) -> bool:
        """Poll NIXL with ``step`` unless finished; return whether all bytes have arrived.

        Raises TransportError if the transfer failed, after which no byte changes any more.
        """
        with self._lock:
            if not self._finished and self.handle is not None:
                try:
                    self._finished = step(self.handle)
                except AgentClosed:
                    raise
                except TransportError as error:
                    self._finished = True
                    self._failure = error.message
            if self._finished:
                self._release()
            if self._failure:
                raise TransportError(self._failure)
            if self.handle is None and not self._finished:
                raise AgentClosed(CLOSED)
            return self._finished

    @property
    def finished(self) -> bool:
        """Whether it has succeeded or failed, as of the last poll."""
        return self._finished

    @property
    def succeeded(self) -> bool:
        """Whether all bytes have arrived, as of the last poll."""
        return self._finished and not self._failure

    def detach(self) -> None:
        """Release the handle, since NIXL is about to end."""
        with self._lock:
            self._release()

    def end(self) -> None:
        """Mark as failed unless finished: NIXL has ended, and no byte arrives any more."""
        with self._lock:
            if not self._finished:
                self._finished, self._failure = True, CLOSED

    def _release(self) -> None:
        handle, self.handle = self.handle, None
        if handle is None:
            return
        try:
            handle.release()
        except Exception:  # noqa: BLE001 - the transfer is finished, whatever NIXL raises
            handle._released = True
        handle._agent = None  # else a traceback that keeps the handle would keep NIXL alive
