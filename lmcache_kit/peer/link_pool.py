"""Links to peers, kept for a while, and the choice of the transport for one."""

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
    """A link, the transport that made it, and why it was not another. ``used``: it has served
    before, so that the peer may have closed it in the meantime."""

    transport: str
    link: Link
    how: str
    incarnation: bytes
    used: bool = False
    idle_since: float = 0.0


class LinkPool:
    """All links of this process. ``blocked`` says why a transport must not be used now."""

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

    def take(
        self,
        remote: SourceClient,
        incarnation: bytes,
        connect: Connect,
        *,
        timeout_s: float,
        fresh: bool = False,
    ) -> PooledLink:
        """A link to a peer, for one user: an idle one unless ``fresh``, or a new one by the first
        transport that serves. Raises TransportError that says why none does."""
        self.expire()
        if not fresh and (idle := self._idle_to(incarnation)):
            return idle
        deadline = self._clock() + timeout_s
        why_not: list[str] = []
        for name in self._transports.names:
            try:
                left_s = max(0.1, deadline - self._clock())
                link = self._connect(name, remote, connect, left_s)
            except TransportError as error:
                why_not.append(f"{name}: {error.message}")
                continue
            how = "; ".join([link.how, *(f"not {each}" for each in why_not)])
            return PooledLink(name, link, how, incarnation)
        raise TransportError(f"no transport reaches {remote.name}: {'; '.join(why_not)}")

    def give(self, chosen: PooledLink) -> None:
        """It works, and its user is done with it."""
        chosen.used = True
        chosen.idle_since = self._clock()
        with self._lock:
            idle = [*self._idle, chosen]
            kept = 0 if self._closed else MAX_IDLE
            over = idle[: max(0, len(idle) - kept)]
            self._idle = idle[len(over) :]
        _close(over)

    def expire(self) -> None:
        """Close what nobody has used for a while."""
        now = self._clock()
        with self._lock:
            late = [each for each in self._idle if now - each.idle_since > KEEP_S]
            self._idle = [each for each in self._idle if each not in late]
        _close(late)

    def close(self) -> None:
        """Close all that is idle; who has one closes it himself."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        _close(idle)

    def _idle_to(self, incarnation: bytes) -> PooledLink | None:
        with self._lock:
            for chosen in reversed(self._idle):
                if chosen.incarnation == incarnation and not self._blocked(chosen.transport):
                    self._idle.remove(chosen)
                    return chosen
        return None

    def _connect(self, name: str, remote: SourceClient, connect: Connect, timeout_s: float) -> Link:
        there = {each.transport: each for each in remote.welcome.transports}.get(name)
        if why := self._blocked(name):
            raise TransportError(why)
        transport = self._transports.get(name)
        if isinstance(transport, str):
            raise TransportError(transport)
        if there is None or there.why_not:
            raise TransportError(f"at {remote.name}: {there.why_not if there else 'not used'}")
        token = remote.welcome.token
        return transport.connect(
            there.address,
            lambda left_s: attach(connect, remote.name, name, token, left_s),
            timeout_s,
        )


def _close(links: Sequence[PooledLink]) -> None:
    for chosen in links:
        with contextlib.suppress(TransportError):
            chosen.link.close()
