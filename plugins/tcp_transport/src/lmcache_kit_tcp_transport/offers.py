"""Offers: regions that peers may read, until they are withdrawn."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lmcache_kit.interfaces import ReadableRegion
from lmcache_kit_tcp_transport.connection import Connection
from lmcache_kit_tcp_transport.wire import MAX_REGIONS, OFFER_TOKEN_BYTES

# A peer may report that it has all bytes before the thread that sent them has left `sending`.
_WITHDRAW_GRACE_S = 0.05


class Offer:
    """Regions of an offer, and the connections that send them now."""

    def __init__(self, regions: Sequence[ReadableRegion]) -> None:
        self.regions = tuple(regions)
        self.sending: set[Connection] = set()


class Offers:
    """Offers by token. Thread-safe."""

    def __init__(self, memory_bytes: int, new_token: Callable[[], bytes] | None = None) -> None:
        self._memory_bytes = memory_bytes
        self._new_token = new_token or partial(secrets.token_bytes, OFFER_TOKEN_BYTES)
        self._offers: dict[bytes, Offer] = {}
        self._changed = threading.Condition()

    def add(self, regions: Sequence[ReadableRegion]) -> bytes:
        """Add an offer; return its token. Raises ValueError for regions outside of the memory."""
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} regions; one offer has at most {MAX_REGIONS}")
        for (offset, nbytes), checksum in regions:
            if offset < 0 or nbytes < 0 or offset + nbytes > self._memory_bytes:
                raise ValueError(
                    f"[{offset}, {offset + nbytes}) is not in the memory, which has "
                    f"{self._memory_bytes} bytes"
                )
            if not 0 <= checksum < 1 << 64:
                raise ValueError(f"{checksum} is no xxh3-64")
        token = self._new_token()
        with self._changed:
            self._offers[token] = Offer(regions)
        return token

    @contextlib.contextmanager
    def sending(self, token: bytes, connection: Connection) -> Iterator[Offer | None]:
        """Yield the offer, or None. While the body runs, :meth:`withdraw` closes the connection."""
        with self._changed:
            offer = self._offers.get(token)
            if offer:
                offer.sending.add(connection)
        try:
            yield offer
        finally:
            if offer:
                with self._changed:
                    offer.sending.discard(connection)
                    self._changed.notify_all()

    def withdraw(self, token: bytes) -> None:
        """Remove an offer, and close the connections that still send it after a grace of 50 ms.

        When this returns, the memory of its regions is not read for this offer any more.
        """
        with self._changed:
            offer = self._offers.pop(token, None)
            if offer is None:
                return
            self._changed.wait_for(lambda: not offer.sending, _WITHDRAW_GRACE_S)
            senders = list(offer.sending)
        for connection in senders:
            connection.close()

    def clear(self) -> None:
        with self._changed:
            self._offers.clear()
