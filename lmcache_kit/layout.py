"""The shape of one token's KV, and what a chunk of it weighs."""

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
    """What one rank stores for a token.

    The payload of a raw chunk is contiguous and layer-major: ``[layers, 2, tokens, kv_heads,
    head_dim]`` for kind ``"kv"`` and ``[layers, 1, tokens, head_dim]`` for kind ``"mla"``
    (``head_dim`` is then the latent width and ``kv_heads`` is 1), in ``dtype``, little-endian.
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
        """Bytes of a raw chunk of ``tokens`` tokens."""
        return tokens * self.token_bytes
