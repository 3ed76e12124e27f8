"""What a cache process may ask a peer for, and how the peer knows that the controller wants it.

Each cache process gives the controller a key of its own when it registers. For a move the
controller seals a claim with the source's key and gives the seal to the destination, which shows
both to the source. So nobody takes or deletes KV that no operator has ordered away, the source need
not be told of moves beforehand, and no cache process learns another's key.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

if TYPE_CHECKING:
    from lmcache_kit.interfaces.operations import Move

KEY_BYTES = 32


class Capability(msgspec.Struct, frozen=True, array_like=True):
    """One move, as its source sees it. ``location`` is the source's; ``tokens`` are packed, None
    for everything there."""

    event_id: str
    source: str
    location: str
    destination: str
    tokens: bytes | None
    cache_salt: str
    model: str | None
    copy: bool

    @classmethod
    def of(cls, order: Move, event_id: str, destination: str) -> Capability:
        """The claim of instance ``destination`` for an order that it was given."""
        return cls(
            event_id,
            order.source,
            order.source_location,
            destination,
            order.tokens,
            order.cache_salt,
            order.model,
            order.copy,
        )

    def seal(self, key: bytes) -> bytes:
        """32 bytes: the BLAKE3 of this claim, keyed with the source's ``key``."""
        return blake3(msgspec.msgpack.encode(self), key=key).digest()

    def is_sealed(self, seal: bytes, key: bytes) -> bool:
        """Whether ``seal`` was made with ``key``; takes as long for any wrong one."""
        return hmac.compare_digest(self.seal(key), seal)
