"""Codecs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

from lmcache_kit.layout import KVLayout

Buffer: TypeAlias = bytes | bytearray | memoryview


class Codec(ABC):
    """Turns the payload of a raw chunk into fewer bytes and back, in host memory."""

    format_version: int
    """Version of the bytes that :meth:`encode` writes; stored with each entry."""

    @abstractmethod
    def encode(self, payload: Buffer, layout: KVLayout, tokens: int) -> bytes:
        """Encode one chunk. ``payload`` has ``layout.payload_bytes(tokens)`` bytes."""

    @abstractmethod
    def decode(self, blob: Buffer, layout: KVLayout, tokens: int, out: Buffer) -> None:
        """Decode into ``out``. Raises ValueError, before writing, for a blob that is not intact."""
