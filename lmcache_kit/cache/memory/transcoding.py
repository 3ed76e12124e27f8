"""Transcoding: encode chunks where they lie, and back."""

from __future__ import annotations

import logging
from threading import Event

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import Entry, Payload, ResolvedEncoding
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.memory.decoding import Decoder
from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.cache.memory.memory_index import MemoryIndex
from lmcache_kit.cache.records import OVER_PIN_BUDGET, Transcoded
from lmcache_kit.interfaces.codec import ChunkInfo, Codec
from lmcache_kit.keys import ChunkKey

_BUSY = "another operation is at work on it"
logger = logging.getLogger(__name__)


class CorruptPayload(ValueError):
    """A raw payload does not match its checksum."""


class Transcoder:
    """Encodes and decodes chunks of memory, in the calling threads, without the lock."""

    def __init__(
        self,
        state: TierState[MemoryIndex],
        decoder: Decoder,
    ) -> None:
        self._state = state
        self._index = state.index
        self._pins = state.pins
        self._decoder = decoder
        self._counters = state.counters
        self._lock = state.lock

    def encode(self, key: ChunkKey, method: str, codec: Codec) -> Transcoded:
        """Encode a chunk. Readers of its raw bytes keep these until they are done."""
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
        # A codec is third-party code: whatever it raises, the chunk stays raw, and that is said.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            logger.exception("could not encode chunk %s", key.hex())
        checksums = [xxh3_64_intdigest(blob) for blob in blobs]
        with self._lock:
            return self._end_encoding(entry, raw, encoding, blobs, checksums, why)

    def decode(self, key: ChunkKey, method: str) -> Transcoded:
        """Replace the encoded payload of a chunk by a raw one."""
        with self._lock:
            entry = self._index.entries.get(key)
            if entry is None or not entry.complete:
                return Transcoded("gone")
            encoding = entry.payload.encoding
            if encoding is None:
                return Transcoded("already")
            if why := self._why_not_decode(entry, encoding, method):
                return Transcoded("failed", why)
            evictor = Evictor(self._state, {key}, 0)
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
        """Return verified blobs, one per rank. Raises ValueError for a chunk that stays raw."""
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
        evictor = Evictor(self._state, {entry.key}, 0)
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
        if not self._pins.fits(entry, raw.nbytes):  # it may have been pinned meanwhile
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
        return "" if self._pins.fits(entry, raw_bytes) else OVER_PIN_BUDGET

    def _drop_corrupt(self, entry: Entry, why: str) -> None:
        with self._lock:
            logger.warning("dropped chunk %s: %s", entry.key.hex(), why)
            self._counters["corrupt_total"] += 1
            self._index.unlink(entry)


def check_payload(payload: memoryview, checksum: int) -> None:
    """Raise CorruptPayload unless the bytes match the checksum."""
    if xxh3_64_intdigest(payload) != checksum:
        raise CorruptPayload("the bytes do not match their checksum")


def encode_payload(payload: memoryview, chunk: ChunkInfo, codec: Codec) -> bytes:
    """Return the blob, verified by decoding. Raises ValueError for one that is of no use."""
    blob = codec.encode(payload, chunk)
    if len(blob) >= payload.nbytes:
        raise ValueError("it would not get smaller")
    codec.decode(blob, chunk, bytearray(payload.nbytes))
    return blob


def not_raw(encoded_with: str, method: str) -> Transcoded:
    """Return the result for a chunk that is encoded already."""
    if encoded_with == method:
        return Transcoded("already")
    return Transcoded("failed", f"it is encoded with {encoded_with}")
