"""Shape and size of a token's KV."""

from __future__ import annotations

from typing import Literal

import msgspec

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3": 1,
    "float8_e5m2": 1,
}


class KVLayout(msgspec.Struct, frozen=True):
    """Layout of the KV of one token, as one rank stores it.

    The payload of a raw chunk is contiguous and layer-major, in ``dtype``, little-endian. Its shape
    is ``[layers, 2, tokens, kv_heads, head_dim]`` for kind ``"kv"``, and ``[layers, 1, tokens,
    head_dim]`` for kind ``"mla"``, where ``head_dim`` is the latent width and ``kv_heads`` is 1.
    """

    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    kind: Literal["kv", "mla"] = "kv"

    @property
    def token_bytes(self) -> int:
        """Bytes of KV per token, over all layers."""
        sides = 2 if self.kind == "kv" else 1
        return self.layers * sides * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def payload_bytes(self, tokens: int) -> int:
        """Return the bytes of a raw chunk of ``tokens`` tokens."""
        return tokens * self.token_bytes
