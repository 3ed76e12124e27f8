"""Copies between vLLM's paged KV cache and raw payloads ``[layers, 2, tokens, heads, dim]``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from lmcache_kit.layout import KVLayout


class TransferSpec(NamedTuple):
    """One copy between blocks and the payload of a chunk.

    Tokens ``[start, end)`` are counted from the first slot of ``blocks``. ``payload`` is that of a
    chunk of ``tokens`` tokens; ``start`` is its token ``skip``.
    """

    blocks: Sequence[int]
    start: int
    end: int
    payload: memoryview
    tokens: int
    skip: int = 0


class KVPages(ABC):
    """The paged KV cache of one worker, all layers. ``layout`` is that of this rank."""

    layout: KVLayout
    block_tokens: int
    """Tokens per block as vLLM's scheduler counts blocks."""

    @abstractmethod
    def gather(self, transfers: Sequence[TransferSpec]) -> list[int]:
        """Copy from the pages into each payload; return the xxh3-64 of each payload.

        A transfer covers its whole payload: ``end - start == tokens`` and ``skip == 0``. Raises
        IndexError for tokens outside of the blocks.
        """

    @abstractmethod
    def scatter(self, transfer: TransferSpec) -> int:
        """Copy from the payload into the pages; return the xxh3-64 of the whole payload.

        Each byte is hashed after it was copied, so a payload that changes during the copy cannot
        match its stored checksum. On a mismatch the caller must treat the written slots as garbage.
        Raises IndexError for tokens outside of the blocks.
        """

    def register_memory(self, incarnation: str, memory: memoryview) -> None:  # noqa: B027  optional
        """Prepare the shared memory of this cache process, which holds the next payloads."""

    def close(self) -> None:  # noqa: B027  optional
        """Drop all references to the shared memory. More calls may follow."""
