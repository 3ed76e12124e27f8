"""Codecs that are easy to see through, and that fail when a test says so."""

from __future__ import annotations

import threading
import zlib

from lmcache_kit.interfaces import BlobInfo, ChunkInfo, Codec
from lmcache_kit.interfaces.codec import Buffer


class Zip(Codec):
    """zlib. ``fail`` is raised by whatever comes next; ``gate`` must be open to decode."""

    format_version = 1

    def __init__(self) -> None:
        self.fail: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.encoded: list[ChunkInfo] = []
        self.decoded = 0

    def encode(self, payload: Buffer, chunk: ChunkInfo) -> bytes:
        assert len(payload) == chunk.payload_bytes
        self.encoded.append(chunk)
        self._raise()
        return zlib.compress(payload, 1)

    def decode(self, blob: Buffer, chunk: ChunkInfo, out: Buffer) -> None:
        self.begun.release()
        assert self.gate.wait(60)
        self._raise()
        try:
            raw = zlib.decompress(blob)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        assert len(raw) == len(out) == chunk.payload_bytes
        memoryview(out)[:] = raw
        self.decoded += 1

    def describe(self, blob: Buffer) -> BlobInfo:
        return BlobInfo(1, 0, len(zlib.decompress(blob)), len(blob))

    def max_blob_bytes(self, chunk: ChunkInfo) -> int:
        return chunk.payload_bytes + 64

    def _raise(self) -> None:
        if self.fail:
            raise self.fail
