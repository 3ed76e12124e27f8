"""The codec ``cachegen``: payloads to blobs and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from lmcache_kit.errors import BlobMismatch, CorruptBlob, UnknownProfile
from lmcache_kit.interfaces import BlobInfo, ChunkInfo, Codec, Rope
from lmcache_kit.interfaces.codec import Buffer
from lmcache_kit.layout import KVLayout
from lmcache_kit_cachegen import bitstream, lossless, quantised
from lmcache_kit_cachegen.bits import ROUNDING, Bits, bits_dtype
from lmcache_kit_cachegen.bitstream import NO_PROFILE, Coder, Header, Stream
from lmcache_kit_cachegen.levels import LOSSLESS, NEAR_LOSSLESS, SINK_TOKENS
from lmcache_kit_cachegen.options import CacheGenOptions
from lmcache_kit_cachegen.profile import Profile, SliceProfile, load_profile
from lmcache_kit_cachegen.quantiser import StreamParameters
from lmcache_kit_cachegen.rope import cosines_and_sines

S = TypeVar("S")
T = TypeVar("T")
_VALUES_PER_STREAM = 1 << 14


class _StreamSlices(NamedTuple):
    """The slices of one stream, without the sink tokens, and the number of the first slice."""

    slices: Bits
    first: int


class CacheGenCodec(Codec):
    """KV in a fifth of the memory, after CacheGen (Liu et al., SIGCOMM 2024), without its deltas.

    Each layer's K and V is a slice. The rotation of K is undone, the mean of every channel is
    subtracted, and the rest is rounded to one uniform step per slice, or to the steps of a profile.
    The steps are entropy-coded with static tables, by interleaved rANS or by zstd. The first token
    of a sequence is stored losslessly.

    Every decoded value is within half a step of the original (K: times the root of two, since a
    rotation mixes pairs), plus one rounding to the dtype. The encoder checks this bound on the
    values that a decoder will see. A stream that misses the bound is stored losslessly, as are fp8,
    MLA and level 0.

    >>> layout = KVLayout("float32", layers=2, kv_heads=4, head_dim=64)
    >>> chunk = ChunkInfo(layout, tokens=256, start=256)
    >>> values = np.random.default_rng(0).normal(size=(2, 2, 256, 4, 64)).astype("<f4")
    >>> codec = CacheGenCodec()
    >>> blob = codec.encode(values.tobytes(), chunk)
    >>> codec.describe(blob).ratio > 10
    True
    >>> codec.decode(blob, chunk, out := bytearray(chunk.payload_bytes))
    >>> bool(abs(np.frombuffer(out, "<f4") - values.ravel()).max() < 0.3)
    True
    """

    format_version = bitstream.FORMAT_VERSION

    def __init__(
        self, options: CacheGenOptions | None = None, *, profiles: Sequence[Profile] = ()
    ) -> None:
        """Load the profiles; ``profiles`` come before those that the options name.

        Raises ConfigError for a profile that cannot be read.
        """
        self.options = options or CacheGenOptions()
        loaded = [*profiles, *map(load_profile, self.options.profiles)]
        self._profiles = {profile.name: profile for profile in loaded}
        self._coder = Coder.ZSTD if self.options.coder == "zstd" else Coder.RANS
        self._profile_slices = lru_cache(maxsize=16)(_slice_profile)
        threads = self.options.threads
        self._pool = ThreadPoolExecutor(threads, "cachegen") if threads > 1 else None

    def encode(self, payload: Buffer, chunk: ChunkInfo) -> bytes:
        words = _words(payload, chunk, "payload")
        if not bitstream.is_valid_rope(chunk.rope, chunk.layout.head_dim):
            raise ValueError(
                f"{chunk.rope} is no rotary embedding of heads of {chunk.layout.head_dim} values"
            )
        level = self.options.level if _is_quantisable(chunk.layout) else LOSSLESS
        profile = next((p for p in self._profiles.values() if level and p.fits(chunk)), None)
        header = Header(
            chunk=chunk,
            level=level,
            sink_tokens=_sink_tokens(chunk) if level else 0,
            slices_per_stream=_slices_per_stream(chunk),
            profile=profile.name if profile else NO_PROFILE,
        )
        params = self._parameters(header)
        streams = self._map(lambda job: _encode(job, params), _jobs(words, header))
        if header.sink_tokens:
            streams.insert(0, lossless.encode(words[:, : header.sink_tokens]))
        return bitstream.write_blob(header, streams)

    def decode(self, blob: Buffer, chunk: ChunkInfo, out: Buffer) -> None:
        header, streams = bitstream.read_blob(blob)
        bitstream.check_chunk(header, chunk)
        words = _words(out, chunk, "out")
        if not words.flags.writeable:
            raise ValueError("out is not writable")
        params = self._parameters(_with_first_head(header, chunk))
        jobs = _jobs(words, header)
        if len(streams) != len(jobs) + (header.sink_tokens > 0):
            wanted = len(jobs) + (header.sink_tokens > 0)
            raise CorruptBlob(f"the blob has {len(streams)} streams; its chunk takes {wanted}")
        if header.sink_tokens:
            sinks = words[:, : header.sink_tokens]
            sinks[:] = lossless.decode(streams.pop(0), words.dtype, sinks.size).reshape(sinks.shape)
        pairs = list(zip(streams, jobs, strict=True))
        self._map(lambda pair: _decode(pair[0], pair[1], params), pairs)

    def describe(self, blob: Buffer) -> BlobInfo:
        header = bitstream.read_header(blob)
        return BlobInfo(
            format_version=bitstream.FORMAT_VERSION,
            level=header.level,
            raw_bytes=header.chunk.payload_bytes,
            blob_bytes=memoryview(blob).nbytes,
            profile="" if header.profile == NO_PROFILE else header.profile.hex(),
        )

    def max_blob_bytes(self, chunk: ChunkInfo) -> int:
        streams = -(-_slice_count(chunk) // _slices_per_stream(chunk)) + 1
        return chunk.payload_bytes + bitstream.header_bytes(chunk.rope, streams)

    def warm_up(self) -> None:
        """Compile each kernel, or load it from numba's cache: seconds, once per machine.

        Encodes and decodes a small chunk. Without this, the first calls of the process wait.
        """
        layout = KVLayout("bfloat16", layers=1, kv_heads=1, head_dim=8)
        chunk = ChunkInfo(layout, tokens=64, start=8, rope=Rope(rotary_dim=8))
        values = np.random.default_rng(0).normal(size=chunk.payload_bytes // 2).astype(np.float32)
        payload = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        out = bytearray(chunk.payload_bytes)
        for level in {self.options.level, NEAR_LOSSLESS}:
            codec = CacheGenCodec(CacheGenOptions(level=level))
            for data in (payload, bytearray(payload)):  # numba compiles for read-only memory too
                codec.decode(codec.encode(data, chunk), chunk, out)

    def _parameters(self, header: Header) -> StreamParameters:
        chunk, layout = header.chunk, header.chunk.layout
        rope = chunk.rope if header.level else None
        cosines = sines = None
        if rope is not None:
            cosines, sines = cosines_and_sines(
                rope, chunk.start + header.sink_tokens, chunk.tokens - header.sink_tokens
            )
        return StreamParameters(
            dtype=layout.dtype,
            level=header.level,
            coder=self._coder,
            tokens=chunk.tokens - header.sink_tokens,
            columns=layout.kv_heads * layout.head_dim,
            head_dim=layout.head_dim,
            cosines=cosines,
            sines=sines,
            interleaved=rope is not None and rope.style == "gptj",
            profile=self._required_slice_profile(header),
        )

    def _required_slice_profile(self, header: Header) -> SliceProfile | None:
        if header.profile == NO_PROFILE:
            return None
        profile = self._profiles.get(header.profile)
        if profile is None:
            known = ", ".join(name.hex() for name in self._profiles) or "none"
            raise UnknownProfile(
                f"the blob needs profile {header.profile.hex()}",
                hint=f"Known: {known}. Add its file to the codec's option `profiles`",
            )
        if not profile.fits(header.chunk):
            raise BlobMismatch(
                f"profile {profile.name.hex()} of {profile.model!r} is not of the blob's model"
            )
        first = header.chunk.first_head
        last = first + header.chunk.layout.kv_heads
        return self._profile_slices(profile, first, last, header.level)

    def _map(self, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        if self._pool is None:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))


def _slice_profile(profile: Profile, first: int, last: int, level: int) -> SliceProfile:
    return profile.slices_of(slice(first, last), level)


def _is_quantisable(layout: KVLayout) -> bool:
    return layout.kind == "kv" and layout.dtype in ROUNDING


def _sink_tokens(chunk: ChunkInfo) -> int:
    return max(0, min(SINK_TOKENS - chunk.start, chunk.tokens))


def _slice_count(chunk: ChunkInfo) -> int:
    return chunk.layout.layers * (2 if chunk.layout.kind == "kv" else 1)


def _slices_per_stream(chunk: ChunkInfo) -> int:
    """Return the slices in one stream: several for a short chunk, to share a stream's header."""
    values = chunk.tokens * chunk.layout.kv_heads * chunk.layout.head_dim
    return max(1, min(_VALUES_PER_STREAM // max(1, values), _slice_count(chunk)))


def _words(data: Buffer, chunk: ChunkInfo, name: str) -> Bits:
    """View ``data`` as ``[slices, tokens, columns]``. Raises ValueError for a wrong size."""
    layout = chunk.layout
    if memoryview(data).nbytes != chunk.payload_bytes or not chunk.payload_bytes:
        raise ValueError(
            f"{name} has {memoryview(data).nbytes} bytes; a chunk of {chunk.tokens} tokens as "
            f"{layout} has {chunk.payload_bytes}, and at least 1"
        )
    words = np.frombuffer(data, bits_dtype(layout.dtype))
    return words.reshape(_slice_count(chunk), chunk.tokens, layout.kv_heads * layout.head_dim)


def _jobs(words: Bits, header: Header) -> list[_StreamSlices]:
    if header.sink_tokens == header.chunk.tokens:
        return []
    step = header.slices_per_stream
    rest = words[:, header.sink_tokens :]
    return [_StreamSlices(rest[i : i + step], i) for i in range(0, len(words), step)]


def _encode(job: _StreamSlices, params: StreamParameters) -> Stream:
    stream = quantised.encode(job.slices, job.first, params) if params.level else None
    return stream or lossless.encode(job.slices)


def _decode(stream: Stream, job: _StreamSlices, params: StreamParameters) -> None:
    if stream.coder in (Coder.RAW, Coder.PLANES):
        words = lossless.decode(stream, job.slices.dtype, job.slices.size)
        job.slices[:] = words.reshape(job.slices.shape)
    elif params.level == LOSSLESS:
        raise CorruptBlob("a lossless blob has a quantised stream")
    else:
        quantised.decode(stream, job.first, job.slices, params)


def _with_first_head(header: Header, chunk: ChunkInfo) -> Header:
    """Return the header with ``first_head`` of ``chunk``, which the blob does not record."""
    found = msgspec.structs.replace(header.chunk, first_head=chunk.first_head)
    return msgspec.structs.replace(header, chunk=found)
