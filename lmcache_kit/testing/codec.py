"""The suite of codecs: round trips, buffers and threads; refusals are beside it."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_kit.interfaces import ChunkInfo, Codec
from lmcache_kit.interfaces.codec import Buffer
from lmcache_kit.layout import KVLayout
from lmcache_kit.testing._bytes import Bytes
from lmcache_kit.testing._codec_damage import RefusingTests
from lmcache_kit.testing.payloads import (
    LAYOUTS,
    chunk_of,
    constant,
    kv_like,
    random_bits,
    shown,
    slices_of,
    special,
    values_of,
)

_UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
_HUGE_TOKENS = 2048

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=shown)
payloads = pytest.mark.parametrize("make", [kv_like, random_bits, special, constant])


class CodecSuite(RefusingTests):
    """Conformance of a :class:`~lmcache_kit.interfaces.Codec`. Define the fixture ``codec``.

    ``lossless``: every payload comes back bit by bit (the default). ``max_error``: for a lossy
    codec, the largest error of a value, as a share of the largest finite magnitude in its slice
    (one layer's K or V). NaN stays NaN and infinities stay infinities: a codec stores losslessly
    what it cannot encode within its error.
    """

    lossless: ClassVar[bool] = True
    max_error: ClassVar[float] = 0.0

    # Round trips.

    @layouts
    @pytest.mark.parametrize("tokens", [1, 24])
    def test_every_layout_comes_back(self, codec: Codec, layout: KVLayout, tokens: int) -> None:
        self.round_trip(codec, chunk_of(layout, tokens), kv_like)

    @layouts
    @payloads
    def test_any_values_come_back(
        self, codec: Codec, layout: KVLayout, make: Callable[[ChunkInfo], bytes]
    ) -> None:
        self.round_trip(codec, chunk_of(layout), make)

    @pytest.mark.parametrize("start", [0, 1, 100_000])
    def test_any_place_in_a_sequence_comes_back(self, codec: Codec, start: int) -> None:
        self.round_trip(codec, chunk_of(LAYOUTS[0], start=start), kv_like)

    def test_a_huge_chunk_comes_back(self, codec: Codec) -> None:
        layout = KVLayout("bfloat16", layers=4, kv_heads=2, head_dim=32)
        self.round_trip(codec, chunk_of(layout, _HUGE_TOKENS), kv_like)

    def test_a_chunk_without_a_known_rotation_comes_back(self, codec: Codec) -> None:
        self.round_trip(codec, ChunkInfo(LAYOUTS[0], tokens=24), kv_like)

    def test_decoding_fills_all_of_out(self, codec: Codec) -> None:
        chunk = chunk_of(LAYOUTS[0])
        blob = codec.encode(kv_like(chunk), chunk)
        filled = []
        for old in (b"\x00", b"\xff"):
            out = bytearray(old * chunk.payload_bytes)
            codec.decode(blob, chunk, out)
            filled.append(Bytes(out))
        assert filled[0] == filled[1], "old bytes of out remain after decode"

    def test_encoding_is_deterministic(self, codec: Codec) -> None:
        for layout in LAYOUTS:
            chunk = chunk_of(layout)
            once, again = (Bytes(codec.encode(kv_like(chunk), chunk)) for _ in range(2))
            assert once == again, f"{layout}: the same chunk gave two blobs"

    def test_warming_up_changes_nothing(self, codec: Codec) -> None:
        chunk = chunk_of(LAYOUTS[0])
        before = Bytes(codec.encode(kv_like(chunk), chunk))
        codec.warm_up()
        codec.warm_up()
        assert Bytes(codec.encode(kv_like(chunk), chunk)) == before

    # Metadata of blobs.

    @layouts
    def test_a_blob_is_never_larger_than_it_says(self, codec: Codec, layout: KVLayout) -> None:
        for tokens in (1, 2, 33):
            chunk = chunk_of(layout, tokens)
            most = codec.max_blob_bytes(chunk)
            for make in (kv_like, random_bits, special, constant):
                blob = codec.encode(make(chunk), chunk)
                assert len(blob) <= most, f"{make.__name__}, {tokens} tokens: over max_blob_bytes"

    @layouts
    def test_describe_agrees_with_the_blob(self, codec: Codec, layout: KVLayout) -> None:
        chunk = chunk_of(layout)
        blob = codec.encode(kv_like(chunk), chunk)
        reported = codec.describe(blob)
        assert reported.format_version == codec.format_version
        assert reported.raw_bytes == chunk.payload_bytes
        assert reported.blob_bytes == len(blob)

    def test_the_format_version_is_a_small_number(self, codec: Codec) -> None:
        assert isinstance(codec.format_version, int)
        assert 0 <= codec.format_version < 1 << 16

    def test_it_is_a_codec(self, codec: Codec) -> None:
        assert isinstance(codec, Codec)

    # Buffers.

    def test_any_kind_of_buffer_will_do(self, codec: Codec) -> None:
        chunk = chunk_of(LAYOUTS[0])
        payload = kv_like(chunk)
        blob = Bytes(codec.encode(payload, chunk))
        plain = self.decoded(codec, blob, chunk)
        for kind in _buffers(payload):
            assert Bytes(codec.encode(kind, chunk)) == blob, f"{type(kind).__name__} as payload"
        for kind in _buffers(blob):
            assert self.decoded(codec, kind, chunk) == plain, f"{type(kind).__name__} as blob"
        padded = bytearray(b"\xa5" * (chunk.payload_bytes + 2))
        codec.decode(blob, chunk, memoryview(padded)[1:-1])
        assert Bytes(padded) == Bytes(b"\xa5" + plain + b"\xa5"), "a part of a buffer as out"

    def test_a_blob_is_bytes_of_its_own(self, codec: Codec) -> None:
        chunk = chunk_of(LAYOUTS[0])
        payload = bytearray(kv_like(chunk))
        blob = codec.encode(payload, chunk)
        before = Bytes(bytearray(blob))
        payload[:] = bytes(len(payload))
        assert type(blob) is bytes
        assert Bytes(blob) == before, "the blob changed with the payload it was made of"

    def test_what_it_reads_stays_as_it_is(self, codec: Codec) -> None:
        chunk = chunk_of(LAYOUTS[0])
        payload = bytearray(kv_like(chunk))
        blob = bytearray(codec.encode(payload, chunk))
        assert Bytes(payload) == Bytes(kv_like(chunk)), "encode changed the payload"
        before = Bytes(blob)
        self.decoded(codec, blob, chunk)
        codec.describe(blob)
        assert Bytes(blob) == before, "decode changed the blob"

    def test_it_keeps_no_hold_of_the_buffers(self, codec: Codec) -> None:
        chunk = chunk_of(LAYOUTS[0])
        payload, out = bytearray(kv_like(chunk)), bytearray(chunk.payload_bytes)
        blob = bytearray(codec.encode(payload, chunk))
        codec.decode(blob, chunk, out)
        codec.describe(blob)
        for name, buffer in (("payload", payload), ("blob", blob), ("out", out)):
            try:
                buffer.append(0)
            except BufferError:
                pytest.fail(f"{name} is still held after the call; its memory cannot be reused")

    # Threads, and code that must not be there.

    def test_threads_do_not_disturb_each_other(self, codec: Codec) -> None:
        chunks = [chunk_of(layout, tokens) for layout in LAYOUTS for tokens in (3, 24)]
        alone = [self._both_ways(codec, chunk) for chunk in chunks]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                together = list(pool.map(lambda chunk: self._both_ways(codec, chunk), chunks))
                assert together == alone, "results in four threads differ from those in one"

    def test_it_does_not_unpickle(self, codec: Codec) -> None:
        package = type(codec).__module__.partition(".")[0]
        found = {
            name: unsafe
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == package
            for unsafe in _imported(getattr(module, "__file__", None)) & _UNSAFE
        }
        assert not found, "blobs come from other hosts: nothing that runs code may read them"

    # Helpers.

    def round_trip(
        self, codec: Codec, chunk: ChunkInfo, make: Callable[[ChunkInfo], bytes]
    ) -> None:
        """Encode, decode and compare."""
        payload = make(chunk)
        self.compare(payload, self.decoded(codec, codec.encode(payload, chunk), chunk), chunk)

    def decoded(self, codec: Codec, blob: Buffer, chunk: ChunkInfo) -> Bytes:
        """Decode a blob and return the payload."""
        out = bytearray(b"\xa5" * chunk.payload_bytes)
        codec.decode(blob, chunk, out)
        return Bytes(out)

    def compare(self, payload: bytes, got: bytes, chunk: ChunkInfo) -> None:
        """Fail if the error is larger than declared."""
        if payload == got:
            return
        assert not self.lossless, f"{chunk.layout}: declared lossless, and bytes changed"
        pairs = zip(slices_of(payload, chunk), slices_of(got, chunk), strict=True)
        for number, (was, now) in enumerate(pairs):
            problem = _difference(was, now, chunk.layout.dtype, self.max_error)
            assert not problem, f"{chunk.layout}, slice {number}: {problem}"

    def _both_ways(self, codec: Codec, chunk: ChunkInfo) -> tuple[Bytes, Bytes]:
        blob = Bytes(codec.encode(kv_like(chunk), chunk))
        return blob, self.decoded(codec, blob, chunk)


def _buffers(data: bytes) -> Iterator[Buffer]:
    yield bytearray(data)
    yield memoryview(data)
    yield memoryview(b"\xa5" + data + b"\xa5")[1:-1]


def _difference(was: Buffer, now: Buffer, dtype: str, share: float) -> str:
    wanted, got = values_of(was, dtype), values_of(now, dtype)
    bound = share * max((abs(value) for value in wanted if math.isfinite(value)), default=0.0)
    for at, (one, other) in enumerate(zip(wanted, got, strict=True)):
        if one == other or (math.isnan(one) and math.isnan(other)):
            continue
        if not (math.isfinite(one) and abs(one - other) <= bound):
            return f"value {at} was {one}, came back as {other}; the bound is {bound:.6g}"
    return ""


def _imported(path: str | None) -> set[str]:
    if not path or not path.endswith(".py"):
        return set()
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
