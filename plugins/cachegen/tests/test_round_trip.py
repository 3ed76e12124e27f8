"""What comes back after encoding and decoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmcache_kit_cachegen.levels import LEVELS, SINK_TOKENS

from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import KVLayout

from .conftest import ROPE, layout, like_kv, payload_of, round_trip, to_values, to_words

DTYPES = ("bfloat16", "float16", "float32")


def error_over_deviation(chunk: ChunkInfo, payload: bytes, out: bytes) -> float:
    """Largest root mean square error of a slice, over its deviation around its channels' means.

    Only for chunks without rotation.
    """
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    error = np.sqrt(np.square(got - wanted).mean(axis=(2, 3, 4)))
    spread = np.sqrt(wanted.var(axis=2).mean(axis=(2, 3)))
    return float((error / spread).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_error_is_that_of_the_level(codec_of, dtype, level):
    chunk = ChunkInfo(layout(dtype), tokens=64, start=SINK_TOKENS)
    payload = payload_of(chunk)
    blob, out = round_trip(codec_of(level), payload, chunk)
    assert len(blob) < len(payload)
    uniform = LEVELS[level].step / np.sqrt(12)
    assert 0.5 * uniform < error_over_deviation(chunk, payload, out) < 1.2 * uniform


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("tokens", [1, 12, 256])
def test_level_0_is_exact_for_any_bits(codec_of, dtype, tokens):
    chunk = ChunkInfo(layout(dtype), tokens)
    payload = np.random.default_rng(0).bytes(chunk.payload_bytes)
    _, out = round_trip(codec_of(0), payload, chunk)
    assert out == payload


@pytest.mark.parametrize("level", [1, 2, 3])
def test_mla_and_fp8_are_exact_at_every_level(codec_of, level):
    for kind in (KVLayout("bfloat16", 3, 1, 40, "mla"), KVLayout("float8_e4m3", 2, 2, 16)):
        chunk = ChunkInfo(kind, tokens=30, start=5)
        payload = np.random.default_rng(0).bytes(chunk.payload_bytes)
        _, out = round_trip(codec_of(level), payload, chunk)
        assert out == payload


@pytest.mark.parametrize("coder", ["rans", "zstd"])
def test_the_first_token_of_a_sequence_is_exact(codec_of, coder):
    chunk = ChunkInfo(layout(), tokens=40, rope=ROPE)
    payload = payload_of(chunk)
    _, out = round_trip(codec_of(coder=coder), payload, chunk)
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    assert (wanted[:, :, :SINK_TOKENS] == got[:, :, :SINK_TOKENS]).all()
    assert not (wanted == got).all()


def test_both_coders_decode_to_the_same_bytes(codec_of):
    chunk = ChunkInfo(layout(), tokens=100, start=7, rope=ROPE)
    payload = payload_of(chunk)
    _, one = round_trip(codec_of(), payload, chunk)
    _, other = round_trip(codec_of(coder="zstd"), payload, chunk)
    assert one == other


def test_threads_change_nothing(codec_of):
    chunk = ChunkInfo(layout(layers=6), tokens=300, rope=ROPE)
    payload = payload_of(chunk)
    assert round_trip(codec_of(threads=3), payload, chunk) == round_trip(codec_of(), payload, chunk)


@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_undoing_the_rotation_makes_the_error_smaller_in_no_more_bytes(codec_of, style):
    rope = Rope(rotary_dim=16, style=style)
    chunk = ChunkInfo(layout(), tokens=256, start=1000, rope=rope)
    payload = payload_of(chunk)
    wanted = to_values(payload, chunk)

    def size_and_error(described: ChunkInfo) -> tuple[int, float]:
        blob, out = round_trip(codec_of(), payload, described)
        return len(blob), float(np.square(to_values(out, chunk) - wanted)[:, 0].mean())

    size, error = size_and_error(chunk)
    plain_size, plain_error = size_and_error(ChunkInfo(chunk.layout, chunk.tokens, chunk.start))
    assert size <= plain_size
    assert error < 0.7 * plain_error


def test_listed_frequencies_undo_the_same_rotation(codec_of):
    chunk = ChunkInfo(layout(), tokens=64, start=99, rope=ROPE)
    listed = Rope(rotary_dim=16, base=1.0, inv_freq=ROPE.frequencies)
    payload = payload_of(chunk)
    _, one = round_trip(codec_of(), payload, chunk)
    _, other = round_trip(codec_of(), payload, ChunkInfo(chunk.layout, 64, 99, listed))
    assert one == other


def test_a_part_of_a_head_may_be_turned(codec_of):
    chunk = ChunkInfo(layout(width=24), tokens=64, start=9, rope=Rope(rotary_dim=8))
    payload = payload_of(chunk)
    blob, _ = round_trip(codec_of(), payload, chunk)
    assert len(payload) > 4 * len(blob)


def test_writable_and_read_only_buffers_will_do(codec_of):
    chunk = ChunkInfo(layout(), tokens=20, start=9)
    payload = payload_of(chunk)
    codec = codec_of()
    blob = codec.encode(memoryview(bytearray(payload)), chunk)
    assert blob == codec.encode(payload, chunk)
    out = bytearray(2 + chunk.payload_bytes)
    codec.decode(bytearray(blob), chunk, memoryview(out)[1:-1])
    assert bytes(out[1:-1]) == round_trip(codec, payload, chunk)[1]
    assert out[0] == out[-1] == 0


SPECIAL = st.sampled_from(
    [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-40, 6e-8, 1e-8, 65504.0, 3e38, -3e38, 1.0]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape_and_any_values_come_back(codec_of, data):
    """Exact or within the step; never larger than raw and a header; special values exact."""
    dtype = data.draw(st.sampled_from(DTYPES))
    wide = layout(
        dtype,
        layers=data.draw(st.integers(1, 3)),
        heads=data.draw(st.integers(1, 3)),
        width=data.draw(st.sampled_from([1, 2, 5, 8, 16])),
    )
    level = data.draw(st.integers(0, 3))
    turned = wide.head_dim // 2 * 2
    rope = None
    if turned and data.draw(st.booleans()):
        rope = Rope(turned, style=data.draw(st.sampled_from(["neox", "gptj"])))
    tokens = data.draw(st.integers(1, 40))
    chunk = ChunkInfo(wide, tokens, data.draw(st.sampled_from([0, 1, 100_000])), rope)
    values = like_kv(chunk, seed=data.draw(st.integers(0, 100)))
    scale = data.draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e4]))
    values = values * scale
    filled = data.draw(st.sampled_from(["", "some", "slice", "channel"]))
    if filled == "some":
        for _ in range(data.draw(st.integers(1, 5))):
            place = tuple(data.draw(st.integers(0, size - 1)) for size in values.shape)
            values[place] = data.draw(SPECIAL)
    elif filled == "slice":
        values[0, 1] = data.draw(SPECIAL)
    elif filled == "channel":
        values[..., 0] = data.draw(SPECIAL)
    with np.errstate(over="ignore", under="ignore"):
        payload = to_words(values, dtype).tobytes()
    codec = codec_of(level, coder=data.draw(st.sampled_from(["rans", "zstd"])))
    blob, out = round_trip(codec, payload, chunk)
    assert len(blob) <= codec.max_blob_bytes(chunk)
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    finite = np.isfinite(wanted)
    assert np.isfinite(got[finite]).all()
    assert np.array_equal(wanted[~finite], got[~finite], equal_nan=True)
    if level == 0:
        assert out == payload


def test_the_worst_payload_gains_no_more_than_a_header(codec_of):
    for dtype in (*DTYPES, "float8_e4m3"):
        chunk = ChunkInfo(layout(dtype), tokens=33, rope=ROPE)
        payload = np.random.default_rng(0).bytes(chunk.payload_bytes)
        for level in range(4):
            codec = codec_of(level)
            assert len(codec.encode(payload, chunk)) <= codec.max_blob_bytes(chunk)
            assert codec.max_blob_bytes(chunk) < len(payload) + 200


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_slice_with_a_special_value_is_exact_and_the_others_are_small(codec_of, value):
    chunk = ChunkInfo(layout(layers=4, heads=4, width=64), tokens=256, start=256)
    values = like_kv(chunk)
    values[1, 0, 100, 2, 3] = value
    payload = to_words(values, "bfloat16").tobytes()
    blob, out = round_trip(codec_of(), payload, chunk)
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    assert np.array_equal(wanted[1, 0], got[1, 0], equal_nan=True)
    assert len(payload) > 3.5 * len(blob)


def test_constant_and_zero_channels_cost_next_to_nothing(codec_of):
    chunk = ChunkInfo(layout(layers=1, heads=4, width=64), tokens=256, start=256)
    values = like_kv(chunk)
    busy = len(round_trip(codec_of(), to_words(values, "bfloat16").tobytes(), chunk)[0])
    values[..., 16:] = 1.5
    half = len(round_trip(codec_of(), to_words(values, "bfloat16").tobytes(), chunk)[0])
    assert half < 0.6 * busy
    values[:] = 0
    blob, out = round_trip(codec_of(), to_words(values, "bfloat16").tobytes(), chunk)
    assert len(blob) < 500
    assert not any(out)
