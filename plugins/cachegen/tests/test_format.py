"""Version 1 of the format, held in place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from lmcache_kit_cachegen import bitstream, kernels, quantised, rans, tables
from lmcache_kit_cachegen.bitstream import Coder

from lmcache_kit.interfaces import ChunkInfo, Rope

from .conftest import layout, round_trip, to_values

GOLDEN = Path(__file__).with_name("golden")


def test_the_tables_are_those_of_version_1():
    assert tables.TABLE_SET.hex() == "1722d51660e335e5"
    decoding = hashlib.blake2b(tables.DECODING.astype("<u4").tobytes(), digest_size=8)
    assert decoding.hexdigest() == "f314cf20d9c0b31f"


def test_reciprocals_divide_exactly():
    draw = np.random.default_rng(0)
    for frequency in range(1, tables.TOTAL + 1):
        reciprocal = -(-(1 << 43) // frequency)
        top = frequency << 20
        for x in (
            0,
            1,
            frequency - 1,
            frequency,
            top - 1,
            top - frequency,
            *draw.integers(top, size=20),
        ):
            assert int(x) * reciprocal < 1 << 64
            assert int(x) * reciprocal >> 43 == int(x) // frequency


def golden_chunk(kind: str) -> ChunkInfo:
    start = 0 if kind == "rans" else 5
    return ChunkInfo(layout(layers=2, heads=1, width=12), 70, start, Rope(8, base=500.0))


@pytest.mark.parametrize("kind", ["rans", "zstd", "near", "lossless"])
def test_a_blob_of_version_1_decodes_as_ever(codec_of, kind):
    """Symbols are exact on every machine; values may differ in their last bit."""
    blob = (GOLDEN / f"{kind}.blob").read_bytes()
    chunk = golden_chunk(kind)
    out = bytearray(chunk.payload_bytes)
    codec_of().decode(blob, chunk, out)
    wanted = to_values((GOLDEN / f"{kind}.values").read_bytes(), chunk)
    got = to_values(out, chunk)
    assert np.allclose(wanted, got, rtol=2**-7, atol=1e-5)
    assert (wanted == got).mean() > 0.99


@pytest.mark.parametrize("kind", ["rans", "zstd", "near", "lossless"])
def test_the_same_values_give_the_same_header_and_coders(codec_of, kind):
    options = {"near": {"level": 1}, "lossless": {"level": 0}, "zstd": {"coder": "zstd"}}
    chunk = golden_chunk(kind)
    payload = (GOLDEN / f"{kind}.payload").read_bytes()
    made = bitstream.read_blob(codec_of(**options.get(kind, {})).encode(payload, chunk))
    known = bitstream.read_blob((GOLDEN / f"{kind}.blob").read_bytes())
    assert made.header == known.header
    assert [stream.coder for stream in made.streams] == [stream.coder for stream in known.streams]


def random_group(heads: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symbols, their tables, and bases of the slices: ``[3, heads + 9, 24]``."""
    draw = np.random.default_rng(seed)
    chosen = draw.integers(1, tables.TABLES, (3, heads + 1, 24)).astype(np.uint8)
    chosen[..., 20:] = tables.ZERO_TABLE
    bases = np.zeros(3, np.int64)
    symbols = np.full((3, heads + 9, 24), tables.LARGEST, np.uint8)
    for s in range(3):
        for r in range(heads + 9):
            for c in range(20):
                known = np.flatnonzero(tables.FREQUENCY[chosen[s, min(r, heads), c]])
                symbols[s, r, c] = draw.choice(known)
        if heads:
            bases[s] = 24
            chosen[s, 0, :20] = tables.TABLES - 8
            around = draw.integers(24 - 15, 24 + 15, 20)
            chosen[s, heads, :20] = around
            symbols[s, 0, :20] = around - 24 + tables.LARGEST
            for r in range(heads, heads + 9):
                for c in range(20):
                    known = np.flatnonzero(tables.FREQUENCY[around[c]])
                    symbols[s, r, c] = draw.choice(known)
    return symbols, chosen, bases


@pytest.mark.parametrize("heads", [0, quantised.HEADER_ROWS])
@pytest.mark.parametrize("seed", range(5))
def test_symbols_come_back_exactly_and_cost_what_their_tables_say(heads, seed):
    symbols, chosen, bases = random_group(heads, seed)
    room = np.empty(symbols.size + rans.FLUSH_WORDS + 1, np.uint16)
    begin = rans.encode(symbols, chosen, heads, tables.ENCODING, tables.RECIPROCAL, room)
    words = np.concatenate([room[begin:], np.zeros(24, np.uint16)])
    given = chosen.copy()
    if heads:
        given[:, heads] = 0
    out = np.empty_like(symbols)
    count = len(room) - begin
    assert rans.decode(words, count, given, bases, heads, tables.DECODING, out) == 0
    assert (out == symbols).all()
    ideal = sum(
        -np.log2(tables.FREQUENCY[chosen[s, min(r, heads), c], symbols[s, r, c]] / tables.TOTAL)
        for s, r, c in np.ndindex(symbols.shape)
    )
    assert ideal / 16 - 1 < count < ideal / 16 * 1.01 + rans.FLUSH_WORDS


def test_decoding_refuses_too_few_and_too_many_words():
    symbols, chosen, bases = random_group(0, 1)
    room = np.empty(symbols.size + rans.FLUSH_WORDS + 1, np.uint16)
    begin = rans.encode(symbols, chosen, 0, tables.ENCODING, tables.RECIPROCAL, room)
    count = len(room) - begin
    words = np.concatenate([room[begin:], np.zeros(25, np.uint16)])
    out = np.empty_like(symbols)
    for wrong in (0, 15, count - 1, count + 1):
        got = rans.decode(words, wrong, chosen, bases, 0, tables.DECODING, out)
        assert got == rans.CORRUPT


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_packed_bits_come_back(width, count):
    values = np.random.default_rng(0).integers(0, 1 << width, count).astype(np.uint8)
    packed = np.zeros(-(-count * width // 8), np.uint8)
    kernels.pack(values, width, packed)
    out = np.empty_like(values)
    kernels.unpack(packed, width, out)
    assert (out == values).all()


def test_escapes_of_any_size_come_back():
    steps = np.array([[0, 16, -16, 63, -64, 64, 8191, -8192, 16000, -16000]], np.int16)
    limits = np.full(10, 15, np.int32)
    symbols, low = np.empty((1, 10), np.uint8), np.zeros((1, 10), np.uint8)
    escapes = np.empty(80, np.uint8)
    one, zero = np.ones(10, np.float32), np.zeros(10, np.float32)
    for shift in (0, 3):
        end = kernels.split(steps, shift, limits, symbols, low, escapes, 0)
        values = np.empty((1, 10), np.float32)
        assert kernels.join(symbols, low, shift, one, zero, escapes[:end], 0, values) == end
        assert (values == steps).all()
        cut = kernels.join(symbols, low, shift, one, zero, escapes[: end - 1], 0, values)
        assert cut == -1


def test_describe_reads_the_header_alone(codec_of):
    blob = (GOLDEN / "rans.blob").read_bytes()
    info = codec_of().describe(blob)
    assert (info.format_version, info.level, info.profile) == (1, 2, "")
    assert info.ratio == golden_chunk("rans").payload_bytes / len(blob)
    assert bitstream.read_blob(blob).streams[0].coder in (Coder.RAW, Coder.PLANES)


def test_the_golden_blobs_are_within_their_bound(codec_of):
    chunk = golden_chunk("zstd")
    payload = (GOLDEN / "zstd.payload").read_bytes()
    _, out = round_trip(codec_of(coder="zstd"), payload, chunk)
    assert np.abs(to_values(out, chunk) - to_values(payload, chunk)).max() < 1.5
