"""Decoding: raw copies of encoded chunks, for readers or to stay."""

from __future__ import annotations

import logging
from concurrent.futures import Executor

from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.index.entries import Decoding, Entry, Payload
from lmcache_kit.cache.index.state import TierState
from lmcache_kit.cache.memory.evictor import Evictor
from lmcache_kit.cache.memory.memory_index import MemoryIndex

logger = logging.getLogger(__name__)


class Decoder:
    """Decodes on the threads of ``loaders``, outside of the lock.

    A copy is ``new``, ``running`` once a thread has it, and then ``done`` or ``failed``. All
    methods but :meth:`run` are called under the lock.
    """

    def __init__(
        self,
        state: TierState[MemoryIndex],
        loaders: Executor,
    ) -> None:
        self._index = state.index
        self._counters = state.counters
        self._lock = state.lock
        self._loaders = loaders

    def copy_of(self, entry: Entry, evictor: Evictor) -> Decoding | None:
        """Return the copy that others read or wait for already, or a new one.

        None without room for a new one. The caller holds a new copy before it starts it.
        """
        copy = entry.decoding
        usable = (
            copy and copy.encoded is entry.payload and copy.raw.regions and copy.state != "failed"
        )
        if copy and usable:
            return copy
        encoding = entry.payload.encoding
        assert encoding is not None
        regions = evictor.take_all([chunk.payload_bytes for chunk in encoding.chunks])
        if not regions:
            return None
        entry.decoding = copy = Decoding(entry, entry.payload, Payload(regions, attached=False))
        copy.encoded.ref_count += 1
        copy.raw.ref_count += 1
        return copy

    def start(self, copy: Decoding) -> None:
        """Submit a copy to the loaders, once."""
        if copy.state == "new":
            copy.state = "running"
            self._loaders.submit(self.run, copy)

    def run(self, copy: Decoding) -> None:
        """Decode, unless nothing holds the copy any more, and call the waiters."""
        with self._lock:
            if copy.raw.ref_count == 1:  # said here, so that nobody comes to wait for it after all
                self._end(copy, [], corrupt=False)
                return
        checksums: list[int] = []
        corrupt = False
        try:
            checksums = self._decode(copy)
        except ValueError as error:
            copy.why, corrupt = str(error), True
        # A codec is third-party code: whatever it raises, the chunk is not there for this reader.
        except Exception as error:
            copy.why = f"{type(error).__name__}: {error}"
            logger.exception("could not decode chunk %s", copy.entry.key.hex())
        with self._lock:
            self._end(copy, checksums, corrupt)

    def _decode(self, copy: Decoding) -> list[int]:
        """Fill the copy and return its checksums. Raises ValueError for a damaged blob."""
        encoding = copy.encoded.encoding
        assert encoding is not None
        checksums = []
        memory = self._index.memory
        for extent, packed, raw, chunk in zip(
            copy.encoded.extents,
            copy.encoded.regions,
            copy.raw.regions,
            encoding.chunks,
            strict=True,
        ):
            with memory.view(packed) as blob, memory.view(raw) as out:
                if xxh3_64_intdigest(blob) != extent.checksum:
                    raise ValueError("the encoded bytes do not match their checksum")
                encoding.codec.decode(blob, chunk, out)
                checksums.append(xxh3_64_intdigest(out))
        return checksums

    def _end(self, copy: Decoding, checksums: list[int], corrupt: bool) -> None:
        if checksums:
            copy.state = "done"
            copy.raw.set_checksums(checksums)
            self._counters["decoded_chunks_total"] += 1
        else:
            copy.state = "failed"
        if corrupt:
            logger.warning("dropped chunk %s: %s", copy.entry.key.hex(), copy.why)
            self._counters["corrupt_total"] += 1
            if copy.entry.payload is copy.encoded:
                self._index.unlink(copy.entry)
        for payload in (copy.encoded, copy.raw):
            payload.ref_count -= 1
            self._index.release_if_unused(payload)
        waiters, copy.waiters = copy.waiters, []
        for tell in waiters:
            tell()
