"""Encoding chunks where they lie, and back: the old bytes serve until the new ones are verified."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AbstractContextManager
from threading import Event
from typing import TYPE_CHECKING, Literal, NamedTuple

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import Payload, ResolvedEncoding
from lmcache_kit.cache.memory.evictor import Evictor

if TYPE_CHECKING:
    from lmcache_kit.cache.index.chunk_index import MemoryIndex
    from lmcache_kit.cache.index.entries import Entry
    from lmcache_kit.cache.index.pins import Pins
    from lmcache_kit.cache.memory.decoding import Decoder
    from lmcache_kit.interfaces.codec import ChunkInfo, Codec
    from lmcache_kit.keys import ChunkKey

_BUSY = "another operation is at work on it"
OVER_PIN_BUDGET = "it is pinned, and would not fit into what may be pinned"
logger = logging.getLogger(__name__)


class Transcoded(NamedTuple):
    """What became of a chunk. ``already``: it was so before. ``gone``: it is not here (any more).
    ``failed``: it stays as it was; ``why`` says why. Bytes are of all ranks."""

    status: Literal["done", "already", "gone", "failed"]
    why: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


class CorruptPayload(ValueError):
    """A raw payload is not what was stored."""


class Transcoder:
    """Called from threads of those who want it, without the lock."""

    def __init__(
        self,
        index: MemoryIndex,
        pins: Pins,
        decoder: Decoder,
        counters: Counter[str],
        lock: AbstractContextManager[object],
    ) -> None:
        self._index = index
        self._pins = pins
        self._decoder = decoder
        self._counters = counters
        self._lock = lock

    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """Encode a chunk; readers of its raw bytes keep these until they are done."""
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is None or not entry.complete:
                return Transcoded("gone")
            if entry.payload.encoding:
                return not_raw(entry.payload.encoding.method, method)
            if entry.busy:
                return Transcoded("failed", _BUSY)
            try:
                infos = tuple(
                    [entry.chunk_info(rank) for rank in range(entry.namespace.world_size)]
                )
            except ValueError as error:
                return Transcoded("failed", str(error))
            raw = entry.payload
            entry.busy = True
            raw.ref_count += 1
        why, blobs = "", list[bytes]()
        encoding = ResolvedEncoding(method, codec.format_version, codec, infos)
        try:
            blobs = self._encode(raw, encoding)
        except ValueError as error:
            why = str(error)
            if isinstance(error, CorruptPayload):
                self._drop_corrupt(entry, why)
        # A codec is somebody's plugin: whatever it raises, the chunk stays raw, and that is said.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            logger.exception("could not encode chunk %s", key.hex())
        checksums = [xxh3_64_intdigest(blob) for blob in blobs]
        with self._lock:
            return self._end_encoding(entry, raw, encoding, blobs, checksums, why)

    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """Decode a chunk for good."""
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is None or not entry.complete:
                return Transcoded("gone")
            encoding = entry.payload.encoding
            if encoding is None:
                return Transcoded("already")
            if why := self._why_not_decode(entry, encoding, method):
                return Transcoded("failed", why)
            evictor = Evictor(self._index, self._counters, {key}, 0)
            copy = self._decoder.copy_of(entry, evictor)
            if copy is None:
                return Transcoded("failed", "no room for the decoded chunk")
            entry.busy = True
            copy.raw.ref_count += 1
            ours = copy.state == "new"
            if ours:
                copy.state = "running"
            ended = Event()
            copy.waiters.append(ended.set)
            if copy.state == "done":
                ended.set()
        if ours:
            self._decoder.run(copy)
        ended.wait()
        with self._lock:
            entry.busy = False
            copy.raw.ref_count -= 1
            result = Transcoded("gone")
            if copy.state != "done":
                result = Transcoded("failed", copy.why)
            elif entry.linked:
                result = self._swap_to_raw(entry, copy.raw)
            self._index.release_if_unused(copy.raw)
            return result

    def _encode(self, raw: Payload, encoding: ResolvedEncoding) -> list[bytes]:
        """The blobs, each decoded once to see that it can be. Raises ValueError for a chunk that
        is to stay raw."""
        blobs = []
        for extent, region, info in zip(raw.extents, raw.regions, encoding.chunks, strict=True):
            with self._index.memory.view(region) as payload:
                check_payload(payload, extent.checksum)
                blobs.append(encode_payload(payload, info, encoding.codec))
        return blobs

    def _end_encoding(  # noqa: PLR0917 - all that there is to know of one chunk
        self,
        entry: Entry,
        raw: Payload,
        encoding: ResolvedEncoding,
        blobs: list[bytes],
        checksums: list[int],
        why: str,
    ) -> Transcoded:
        entry.busy = False
        raw.ref_count -= 1
        bytes_before = raw.nbytes
        if not entry.linked:
            self._index.release_if_unused(raw)
            return Transcoded("failed", why) if why else Transcoded("gone")
        if why:
            self._counters["encode_failed_total"] += 1
            return Transcoded("failed", why)
        evictor = Evictor(self._index, self._counters, {entry.key}, 0)
        sizes = [len(blob) for blob in blobs]
        regions = evictor.take_all(sizes) if raw.ref_count else []
        if raw.ref_count and not regions:
            return Transcoded("failed", "no room for the encoded chunk while others read it")
        self._index.detach(entry)
        # Nobody reads the raw bytes, so their room is free now, and the blobs are smaller.
        regions = regions or evictor.take_all(sizes)
        if not regions:
            self._index.unlink(entry)  # its payload, detached already, has no encoding to uncount
            return Transcoded("gone", "no room for the encoded chunk where the raw one was")
        payload = Payload(regions, encoding)
        for region, blob in zip(regions, blobs, strict=True):
            self._index.memory.view(region)[:] = blob
        payload.set_checksums(checksums)
        self._index.attach_payload(entry, payload)
        self._counters["encoded_chunks_total"] += 1
        return Transcoded("done", "", bytes_before, payload.nbytes)

    def _swap_to_raw(self, entry: Entry, raw: Payload) -> Transcoded:
        if self._over_pin_budget(entry, raw.nbytes):  # it may have been pinned meanwhile
            return Transcoded("failed", OVER_PIN_BUDGET)
        bytes_before = entry.nbytes
        self._index.detach(entry)
        self._index.attach_payload(entry, raw)
        return Transcoded("done", "", bytes_before, raw.nbytes)

    def _why_not_decode(self, entry: Entry, encoding: ResolvedEncoding, method: str) -> str:
        if encoding.method != method:
            return f"it is encoded with {encoding.method}"
        if entry.busy:
            return _BUSY
        raw_bytes = sum([chunk.payload_bytes for chunk in encoding.chunks])
        return OVER_PIN_BUDGET if self._over_pin_budget(entry, raw_bytes) else ""

    def _over_pin_budget(self, entry: Entry, raw_bytes: int) -> bool:
        growth = raw_bytes - entry.nbytes
        return bool(entry.pins) and self._pins.pinned_bytes + growth > self._pins.budget_bytes

    def _drop_corrupt(self, entry: Entry, why: str) -> None:
        with self._lock:
            logger.warning("dropped chunk %s: %s", entry.key.hex(), why)
            self._counters["corrupt_total"] += 1
            self._index.unlink(entry)


def check_payload(payload: memoryview, checksum: int) -> None:
    """Raises CorruptPayload when these are not the bytes that were stored."""
    if xxh3_64_intdigest(payload) != checksum:
        raise CorruptPayload("the bytes do not match their checksum")


def encode_payload(payload: memoryview, chunk: ChunkInfo, codec: Codec) -> bytes:
    """The blob, decoded once to see that it can be. Raises ValueError for one that is of no use."""
    blob = codec.encode(payload, chunk)
    if len(blob) >= payload.nbytes:
        raise ValueError("it would not get smaller")
    codec.decode(blob, chunk, bytearray(payload.nbytes))
    return blob


def not_raw(encoded_with: str, method: str) -> Transcoded:
    """What becomes of a chunk that is encoded already."""
    if encoded_with == method:
        return Transcoded("already")
    return Transcoded("failed", f"it is encoded with {encoded_with}")
