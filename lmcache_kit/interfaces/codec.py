"""Contract of codecs: payloads of raw chunks to blobs and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import msgspec

from lmcache_kit.layout import KVLayout

Buffer: TypeAlias = bytes | bytearray | memoryview


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding (RoPE) in K: which pairs are rotated, and by which frequencies.

    The first ``rotary_dim`` values of a head are rotated. ``"neox"`` pairs value ``i`` with
    ``i + rotary_dim / 2``, ``"gptj"`` pairs ``2i`` with ``2i + 1``. Pair ``i`` is rotated by
    ``frequencies[i]`` radians a token: ``inv_freq`` where it is given (for every scaling, such as
    linear, llama3 or yarn), else ``base ** (-2i / rotary_dim)``. A constant factor on the whole of
    K, as yarn has, is no part of this. A rotation that depends on the length of the sequence cannot
    be described: use None.
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
    """Description of a payload.

    ``start`` is the position of its first token in the sequence. ``rope`` is the rotary embedding
    in its K, or None if there is none or it is unknown. ``first_head`` is the number of this rank's
    first KV head in the whole model.
    """

    layout: KVLayout
    tokens: int
    start: int = 0
    rope: Rope | None = None
    first_head: int = 0

    @property
    def payload_bytes(self) -> int:
        return self.layout.payload_bytes(self.tokens)


class BlobInfo(msgspec.Struct, frozen=True):
    """Description of a blob, from its header alone."""

    format_version: int
    level: int
    raw_bytes: int
    blob_bytes: int
    profile: str = ""
    """Name of the profile that decoding needs; empty if it needs none."""

    @property
    def ratio(self) -> float:
        """Compression ratio: raw bytes over blob bytes."""
        return self.raw_bytes / self.blob_bytes


class Codec(ABC):
    """Encode payloads of raw chunks to blobs, and decode them, in host memory.

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
    """Format version of the blobs of :meth:`encode`; stored with each entry."""

    @abstractmethod
    def encode(self, payload: Buffer, chunk: ChunkInfo) -> bytes:
        """Encode one chunk.

        Values that cannot be encoded within the codec's declared error are stored losslessly.
        Raises ValueError for a payload that is not ``chunk.payload_bytes`` long.
        """

    @abstractmethod
    def decode(self, blob: Buffer, chunk: ChunkInfo, out: Buffer) -> None:
        """Decode into the whole of ``out``. ``chunk`` is the one that was given to encode.

        Raises CorruptBlob for a damaged blob, UnknownVersion for another format version,
        UnknownProfile for a profile that is not loaded, and BlobMismatch for another chunk. All are
        ValueErrors, and leave ``out`` unchanged.
        """

    @abstractmethod
    def describe(self, blob: Buffer) -> BlobInfo:
        """Describe a blob from its header alone. Raises as decode does."""

    @abstractmethod
    def max_blob_bytes(self, chunk: ChunkInfo) -> int:
        """Return the most bytes that encode returns for this chunk."""

    def warm_up(self) -> None:  # noqa: B027 - most codecs have nothing to prepare
        """Prepare all that the first calls would otherwise wait for, off the serving path."""
