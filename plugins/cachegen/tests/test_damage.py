"""Blobs that are damaged, foreign or forged are refused before anything is written."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
import pytest
from lmcache_kit_cachegen import bitstream
from lmcache_kit_cachegen.bitstream import Coder, Stream

from lmcache_kit.errors import BlobMismatch, CorruptBlob, UnknownProfile, UnknownVersion
from lmcache_kit.interfaces import ChunkInfo, Rope

from .conftest import layout, payload_of

UNTOUCHED = 0x5A


def assert_refused(codec, blob, chunk, error=ValueError, match=None):
    out = bytearray([UNTOUCHED]) * chunk.payload_bytes
    with pytest.raises(error, match=match):
        codec.decode(blob, chunk, out)
    assert out == bytearray([UNTOUCHED]) * chunk.payload_bytes


@pytest.fixture(params=["rans", "zstd", "lossless"])
def small(request, codec_of):
    """Codec, chunk and blob, small enough to damage in every way."""
    level, coder = (0, "rans") if request.param == "lossless" else (2, request.param)
    codec = codec_of(level, coder=coder)
    chunk = ChunkInfo(layout(layers=1, heads=1, width=8), tokens=20, rope=Rope(8))
    return codec, chunk, codec.encode(payload_of(chunk), chunk)


def test_every_flipped_bit_is_noticed(small):
    codec, chunk, blob = small
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_refused(codec, damaged, chunk)


def test_every_cut_is_noticed(small):
    codec, chunk, blob = small
    for length in range(len(blob)):
        assert_refused(codec, blob[:length], chunk, CorruptBlob)
    assert_refused(codec, blob + b"\0", chunk, CorruptBlob)


def test_flipped_bits_in_a_large_blob_are_noticed(codec_of):
    chunk = ChunkInfo(layout(layers=4, heads=4, width=64), tokens=256, rope=Rope(64))
    codec = codec_of()
    blob = codec.encode(payload_of(chunk), chunk)
    draw = random.Random(0)
    for bit in draw.sample(range(8 * len(blob)), 300):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_refused(codec, damaged, chunk)


def test_noise_is_refused(codec_of):
    chunk = ChunkInfo(layout(), tokens=4)
    for seed in range(50):
        noise = np.random.default_rng(seed).bytes(300)
        assert_refused(codec_of(), noise, chunk, CorruptBlob, "do not begin with a header")
    assert_refused(codec_of(), b"", chunk, CorruptBlob, "0 bytes")


def with_new_checksum(blob: bytes, at: int, value: bytes) -> bytes:
    """The header changed, and its checksum with it: not damaged, but different."""
    nbytes = struct.unpack_from("<I", blob, 6)[0]
    head = bytearray(blob[: nbytes - 4])
    head[at : at + len(value)] = value
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + blob[nbytes:]


def test_another_version_is_refused_by_name(small):
    codec, chunk, blob = small
    newer = with_new_checksum(blob, 4, struct.pack("<H", 2))
    assert_refused(codec, newer, chunk, UnknownVersion, "has format version 2. Known: 1")


def test_other_tables_are_refused_by_name(small):
    codec, chunk, blob = small
    at = blob.index(bitstream.TABLE_SET)
    other = with_new_checksum(blob, at, b"\1" * 8)
    assert_refused(codec, other, chunk, UnknownVersion, "needs table set 0101010101010101")


def test_a_missing_profile_is_refused_by_name(small):
    codec, chunk, blob = small
    at = blob.index(bitstream.TABLE_SET) + 8
    other = with_new_checksum(blob, at, b"\2" * 16)
    assert_refused(codec, other, chunk, UnknownProfile, f"needs profile {'02' * 16}. Known: none")


@pytest.mark.parametrize(
    "other",
    [
        ChunkInfo(layout(layers=1, heads=1, width=8), tokens=20, start=1),
        ChunkInfo(layout(layers=1, heads=1, width=8), tokens=19),
        ChunkInfo(layout("float16", layers=1, heads=1, width=8), tokens=20),
        ChunkInfo(layout(layers=1, heads=2, width=4), tokens=20),
    ],
)
def test_a_blob_of_another_chunk_is_refused(small, other):
    codec, _, blob = small
    assert_refused(codec, blob, other, BlobMismatch, "the blob has 20 tokens from 0 on")


@pytest.mark.parametrize(
    "rope",
    [
        Rope(18),
        Rope(7),
        Rope(0),
        Rope(16, inv_freq=(1.0,)),
        Rope(16, style="other"),
        Rope(16, base=0.0),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(codec_of, rope):
    chunk = ChunkInfo(layout(), tokens=4, rope=rope)
    with pytest.raises(ValueError, match="no rotary embedding of heads of 16 values"):
        codec_of().encode(payload_of(ChunkInfo(layout(), tokens=4)), chunk)


def test_wrong_lengths_are_refused(codec_of):
    chunk = ChunkInfo(layout(), tokens=10)
    payload = payload_of(chunk)
    codec = codec_of()
    with pytest.raises(ValueError, match=f"payload has {len(payload) - 1} bytes"):
        codec.encode(payload[:-1], chunk)
    with pytest.raises(ValueError, match=f"out has {len(payload) + 2} bytes"):
        codec.decode(codec.encode(payload, chunk), chunk, bytearray(len(payload) + 2))
    with pytest.raises(ValueError, match="not writable"):
        codec.decode(codec.encode(payload, chunk), chunk, payload)
    with pytest.raises(ValueError, match="at least 1"):
        codec.encode(b"", ChunkInfo(layout(), tokens=0))


@pytest.mark.parametrize("coder", [Coder.RANS, Coder.ZSTD, Coder.PLANES, Coder.RAW])
def test_forged_streams_are_refused_or_decoded_within_bounds(codec_of, coder):
    """Checksums that are right say nothing of who made them: whatever stands in a stream, decoding
    reads and writes nothing outside its buffers."""
    codec = codec_of(2, coder="zstd" if coder == Coder.ZSTD else "rans")
    chunk = ChunkInfo(layout(layers=1, heads=1, width=8), tokens=40, start=3, rope=ROPE_8)
    header, streams = bitstream.read_blob(codec.encode(payload_of(chunk), chunk))
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(streams[0].data)
        for _ in range(draw.integers(1, 4)):
            data[draw.integers(len(data))] = draw.integers(256)
        data = data[: draw.integers(1, len(data) + 1)] if draw.random() < 0.5 else data
        forged = bitstream.write_blob(header, [Stream(coder, bytes(data)), *streams[1:]])
        try:
            codec.decode(forged, chunk, bytearray(chunk.payload_bytes))
        except CorruptBlob:
            refused += 1
    assert refused > 200


ROPE_8 = Rope(8)


def test_forged_headers_are_refused(small):
    codec, chunk, blob = small
    for at in range(10, struct.unpack_from("<I", blob, 6)[0] - 4):
        for value in (0, 1, 0x7F, 0xFF):
            forged = with_new_checksum(blob, at, bytes([value]))
            out = bytearray(chunk.payload_bytes)
            try:
                codec.decode(forged, chunk, out)
            except ValueError:
                continue
            assert len(out) == chunk.payload_bytes
