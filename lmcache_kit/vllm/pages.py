"""Between vLLM's paged KV and the kit's canonical payload ``[layers, 2, tokens, heads, dim]``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from lmcache_kit.layout import KVLayout


class Piece(NamedTuple):
    """Tokens ``[start, end)`` of a sequence, counted from the first slot of ``blocks``, and the
    payload of a chunk of ``tokens`` tokens in which they begin at row ``skip``."""

    blocks: Sequence[int]
    start: int
    end: int
    payload: memoryview
    tokens: int
    skip: int = 0


class Pages(ABC):
    """The KV cache of one worker, all layers. ``layout`` is what this rank holds of a token."""

    layout: KVLayout
    block_tokens: int
    """Tokens per block as vLLM's scheduler counts blocks."""

    @abstractmethod
    def gather(self, pieces: Sequence[Piece]) -> list[int]:
        """Write each piece into its payload, and return the xxh3-64 of each payload.

        A piece covers its whole payload: ``end - start == tokens`` and ``skip == 0``.
        """

    @abstractmethod
    def scatter(self, piece: Piece) -> int:
        """Write the piece from its payload into the pages; return the xxh3-64 of the payload.

        Each byte is hashed after it was read, so a payload that changed under the reader cannot
        match the checksum it was stored with. The caller must treat the written slots as garbage
        when it does not match.
        """

    def use_memory(self, incarnation: str, memory: memoryview) -> None:  # noqa: B027  optional
        """Payloads of the next calls lie in this memory of that cache process."""

    def close(self) -> None:  # noqa: B027  optional
        """Let go of everything that refers to the shared memory. More calls may follow."""
