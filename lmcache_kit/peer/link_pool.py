"""Links to peers, reused by one move after another, and the choice of a transport for each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache_kit.errors import TransportError
from lmcache_kit.interfaces import Link
from lmcache_kit.peer.source_client import Connect, attach

if TYPE_CHECKING:
    from lmcache_kit.peer.source_client import SourceClient
    from lmcache_kit.peer.transports import Transports

KEEP_S = 60.0
MAX_IDLE = 16


@dataclass(slots=True, eq=False)
class PooledLink:
    """A link to one incarnation of a peer, and the transport that made it.

    ``description`` also says why other transports were not used. ``used``: the link has served
    before, so that the peer may have closed it in the meantime.
    """

    transport: str
    link: Link
    description: str
    incarnation: bytes
    used: bool = False
    idle_since: float = 0.0


class LinkPool:
    """All links of this process.

    ``blocked`` returns why a transport must not be used now, or an empty string.
    """

    def __init__(
        self,
        transports: Transports,
        *,
        blocked: Callable[[str], str] = lambda _: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transports = transports
        self._blocked = blocked
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[PooledLink] = []
        self._closed = False

    @property
    def idle(self) -> int:
        """How many links wait for their next move."""
        return len(self._idle)

    def acquire(
        self,
        client: SourceClient,
        incarnation: bytes,
        connect: Connect,
        *,
        timeout_s: float,
        fresh: bool = False,
    ) -> PooledLink:
        """Return an idle link to a peer, unless ``fresh``, or a new one by the first transport
        that reaches it.

        The caller has it alone until it calls :meth:`release`, or closes the link. Raises
        TransportError with every transport's reason when none reaches the peer.
        """
        self.expire()
        if not fresh and (idle := self._acquire_idle(incarnation)):
            return idle
        deadline = self._clock() + timeout_s
        reasons: list[str] = []
        for name in self._transports.names:
            try:
                left_s = max(0.1, deadline - self._clock())
                link = self._connect(name, client, connect, left_s)
            except TransportError as error:
                reasons.append(f"{name}: {error.message}")
                continue
            description = "; ".join([link.description, *(f"not {each}" for each in reasons)])
            return PooledLink(name, link, description, incarnation)
        raise TransportError(f"no transport reaches {client.name}: {'; '.join(reasons)}")

    def release(self, pooled: PooledLink) -> None:
        """Take back a link that works."""
        pooled.used = True
        pooled.idle_since = self._clock()
        with self._lock:
            idle = [*self._idle, pooled]
            kept = 0 if self._closed else MAX_IDLE
            surplus = idle[: max(0, len(idle) - kept)]
            self._idle = idle[len(surplus) :]
        _close(surplus)

    def expire(self) -> None:
        """Close links that were idle for ``KEEP_S``."""
        now = self._clock()
        with self._lock:
            late = [each for each in self._idle if now - each.idle_since > KEEP_S]
            self._idle = [each for each in self._idle if each not in late]
        _close(late)

    def close(self) -> None:
        """Close idle links; links in use are closed by their users."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        _close(idle)

    def _acquire_idle(self, incarnation: bytes) -> PooledLink | None:
        with self._lock:
            for pooled in reversed(self._idle):
                if pooled.incarnation == incarnation and not self._blocked(pooled.transport):
                    self._idle.remove(pooled)
                    return pooled
        return None

    def _connect(self, name: str, client: SourceClient, connect: Connect, timeout_s: float) -> Link:
        there = {each.transport: each for each in client.welcome.transports}.get(name)
        if why := self._blocked(name):
            raise TransportError(why)
        transport = self._transports.get(name)
        if isinstance(transport, str):
            raise TransportError(transport)
        if there is None or there.unusable:
            raise TransportError(f"at {client.name}: {there.unusable if there else 'not used'}")
        token = client.welcome.token
        return transport.connect(
            there.address,
            lambda left_s: attach(connect, client.name, name, token, left_s),
            timeout_s,
        )


def _close(links: Sequence[PooledLink]) -> None:
    for pooled in links:
        with contextlib.suppress(TransportError):
            pooled.link.close()
