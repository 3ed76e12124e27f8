"""A signed capability: the controller's permission to take one move from a cache process.

Each cache process gives the controller a secret key when it registers. For a move the controller
signs a capability with the source's key and hands the signature to the destination, which shows
both to the source. Consequences:

1. Nothing is read or deleted that no operator has asked to move.
2. The source need not be told of a move beforehand.
3. No cache process learns the key of another.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

if TYPE_CHECKING:
    from lmcache_kit.interfaces.operations import Move

CAPABILITY_KEY_BYTES = 32


class Capability(msgspec.Struct, frozen=True, array_like=True):
    """One move, as its source sees it.

    ``location`` is the source's. ``tokens`` are packed; None means everything at that location.
    """

    operation_id: str
    source: str
    location: str
    destination: str
    tokens: bytes | None
    cache_salt: str
    model: str | None
    copy: bool

    @classmethod
    def of(cls, request: Move, operation_id: str, destination: str) -> Capability:
        """Build the capability for instance ``destination`` to carry out a move request."""
        return cls(
            operation_id,
            request.source,
            request.source_location,
            destination,
            request.tokens,
            request.cache_salt,
            request.model,
            request.copy,
        )

    def sign(self, key: bytes) -> bytes:
        """Return 32 bytes: BLAKE3 of this capability, keyed with the source's ``key``."""
        return blake3(msgspec.msgpack.encode(self), key=key).digest()

    def verify(self, signature: bytes, key: bytes) -> bool:
        """Return whether ``key`` made this signature, in time that does not depend on it."""
        return hmac.compare_digest(self.sign(key), signature)
