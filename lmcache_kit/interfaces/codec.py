"""Codecs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import msgspec

from lmcache_kit.layout import KVLayout

Buffer: TypeAlias = bytes | bytearray | memoryview


class Rope(msgspec.Struct, frozen=True):
    """The rotary embedding in K, as far as a codec needs it: which pairs turn, and how fast.

    The first ``rotary_dim`` values of a head are turned. ``"neox"`` pairs value ``i`` with
    ``i + rotary_dim / 2``, ``"gptj"`` pairs ``2i`` with ``2i + 1``. Pair ``i`` turns by
    ``frequencies[i]`` radians a token: ``inv_freq`` where it is given, and so for every scaling
    (linear, llama3, yarn), else ``base ** (-2i / rotary_dim)``. A constant factor on the whole
    of K (yarn's) is no rotation, and a codec need not know it. A rotation that depends on the
    length of the sequence has no record: use None.
    """

    rotary_dim: int
    base: float = 10000.0
    style: Literal["neox", "gptj"] = "neox"
    inv_freq: tuple[float, ...] = ()

    @property
    def frequencies(self) -> tuple[float, ...]:
        if self.inv_freq:
            return self.inv_freq
        pairs = range(0, self.rotary_dim, 2)
        return tuple(float(self.base ** (-pair / self.rotary_dim)) for pair in pairs)


class ChunkInfo(msgspec.Struct, frozen=True):
    """What a payload is. ``start`` is the position of its first token in the sequence, ``rope``
    the rotation in its K (None: there is none, or it is not known), ``first_head`` the number of
    this rank's first KV head in the whole model."""

    layout: KVLayout
    tokens: int
    start: int = 0
    rope: Rope | None = None
    first_head: int = 0

    @property
    def payload_bytes(self) -> int:
        return self.layout.payload_bytes(self.tokens)


class BlobInfo(msgspec.Struct, frozen=True):
    """What a codec says about bytes that it wrote, from their header alone."""

    format_version: int
    level: int
    raw_bytes: int
    blob_bytes: int
    profile: str = ""
    """Name of the side information that decoding needs; empty when it needs none."""

    @property
    def ratio(self) -> float:
        """How many times smaller the blob is."""
        return self.raw_bytes / self.blob_bytes


class Codec(ABC):
    """Turns the payload of a raw chunk into fewer bytes and back, in host memory.

    Thread-safe: one instance serves several threads at a time, and holds the GIL only briefly.

    >>> import zlib
    >>> from lmcache_kit.errors import CorruptBlob
    >>> class Deflate(Codec):
    ...     format_version = 1
    ...
    ...     def encode(self, payload, chunk):
    ...         return zlib.compress(payload)
    ...
    ...     def decode(self, blob, chunk, out):
    ...         try:
    ...             out[:] = zlib.decompress(blob)
    ...         except zlib.error as error:
    ...             raise CorruptBlob(str(error)) from error
    ...
    ...     def describe(self, blob):
    ...         plain = zlib.decompress(blob)
    ...         return BlobInfo(1, level=0, raw_bytes=len(plain), blob_bytes=len(blob))
    ...
    ...     def max_blob_bytes(self, chunk):
    ...         return chunk.payload_bytes + chunk.payload_bytes // 1000 + 16
    >>> chunk = ChunkInfo(KVLayout("float16", layers=1, kv_heads=1, head_dim=64), tokens=4)
    >>> blob = Deflate().encode(bytes(chunk.payload_bytes), chunk)
    >>> Deflate().decode(blob, chunk, out := bytearray(chunk.payload_bytes))
    >>> Deflate().describe(blob).ratio > 50
    True
    """

    format_version: int
    """Version of the bytes that :meth:`encode` writes; stored with each entry."""

    @abstractmethod
    def encode(self, payload: Buffer, chunk: ChunkInfo) -> bytes:
        """Encode one chunk. What the codec cannot hold within its declared error, it keeps bit by
        bit. Raises ValueError for a payload that is not ``chunk.payload_bytes`` long."""

    @abstractmethod
    def decode(self, blob: Buffer, chunk: ChunkInfo, out: Buffer) -> None:
        """Decode into ``out``, all of it.

        ``chunk`` is what was given to encode. Nothing is written for a blob that was damaged
        (CorruptBlob), of another version (UnknownVersion), made with a profile that is not at
        hand (UnknownProfile), or of another chunk (BlobMismatch): all are ValueErrors.
        """

    @abstractmethod
    def describe(self, blob: Buffer) -> BlobInfo:
        """Read the header, and no more. Raises as decode does."""

    @abstractmethod
    def max_blob_bytes(self, chunk: ChunkInfo) -> int:
        """The most that encode returns for this chunk."""

    def warm_up(self) -> None:  # noqa: B027 - most codecs have nothing to prepare
        """Do now, off the serving path, what the first calls would otherwise wait for."""
