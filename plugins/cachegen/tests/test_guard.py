"""Where the bound cannot be held, or holding it would lose what matters, values stay exact."""

from __future__ import annotations

import numpy as np
import pytest
from lmcache_kit_cachegen import bitstream, kernels, quantiser
from lmcache_kit_cachegen.bitstream import Coder
from lmcache_kit_cachegen.levels import LEVELS

from lmcache_kit.interfaces import ChunkInfo, Rope

from .conftest import layout, like_kv, payload_of, round_trip, to_values, to_words

CHUNK = ChunkInfo(layout(layers=2, heads=4, width=32), tokens=128, start=9, rope=Rope(32))


def coders(blob: bytes) -> list[Coder]:
    return [stream.coder for stream in bitstream.read_blob(blob).streams]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_value_is_within_its_bound(codec_of, level, dtype):
    """Half a step, the root of two for the rotation, and a rounding."""
    chunk = ChunkInfo(layout(dtype, heads=4, width=32), tokens=128, start=9, rope=Rope(32))
    payload = payload_of(chunk)
    blob, out = round_trip(codec_of(level), payload, chunk)
    assert coders(blob) == [Coder.RANS] * 4
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    still = like_kv(ChunkInfo(chunk.layout, chunk.tokens))  # the same values, never turned
    spread = np.sqrt(still.var(axis=2).mean(axis=(2, 3)))[:, :, None, None, None]
    step = LEVELS[level].step * spread * 1.03  # a step is the next power of 2 ** (1 / 16)
    share = np.abs(got - wanted) / (step + np.abs(wanted) * 2**-7)
    assert share[:, 1].max() <= 0.51
    assert share[:, 0].max() <= 0.51 * np.sqrt(2)


def test_a_few_outliers_do_not_cost_all_other_values(codec_of):
    values = like_kv(CHUNK)
    values[1, 1, 5:8] *= 1e6
    payload = to_words(values, "bfloat16").tobytes()
    blob, out = round_trip(codec_of(), payload, CHUNK)
    wanted, got = to_values(payload, CHUNK), to_values(out, CHUNK)
    assert coders(blob) == [Coder.RANS] * 3 + [Coder.PLANES]
    assert (wanted[1, 1] == got[1, 1]).all()


def test_half_precision_that_would_overflow_is_exact(codec_of):
    chunk = ChunkInfo(layout("float16", heads=4, width=32), tokens=128, start=9)
    values = like_kv(chunk)
    values[0, 0] = np.where(values[0, 0] > 0, 65000.0, -65000.0)
    values[0, 0, 0] = 65504.0
    payload = to_words(values, "float16").tobytes()
    _, out = round_trip(codec_of(3), payload, chunk)
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    assert np.isfinite(got).all()
    assert np.abs(got - wanted)[0, 0].max() < 60000


def test_a_large_mean_beside_a_small_spread_is_exact(codec_of):
    values = like_kv(CHUNK)
    values[0, 1] = 3e4 + values[0, 1] * 1e-3
    payload = to_words(values, "bfloat16").tobytes()
    _, out = round_trip(codec_of(), payload, CHUNK)
    assert (to_values(payload, CHUNK)[0, 1] == to_values(out, CHUNK)[0, 1]).all()


def test_an_encoder_that_breaks_its_bound_falls_back_to_lossless(codec_of, monkeypatch):
    """The check is on the values that a decoder will see."""
    payload = payload_of(CHUNK)
    honest = kernels.quantise

    def broken(values, mean, scale, shift, steps, sizes):
        filled = honest(values, mean, scale, shift, steps, sizes)
        values[7, 7] += 2 * scale[7]
        return filled

    monkeypatch.setattr(quantiser.kernels, "quantise", broken)
    blob, out = round_trip(codec_of(), payload, CHUNK)
    assert coders(blob) == [Coder.PLANES] * 4
    assert out == payload


def test_one_token_without_a_profile_is_exact(codec_of):
    chunk = ChunkInfo(layout(), tokens=1, start=9)
    payload = payload_of(chunk)
    assert round_trip(codec_of(), payload, chunk)[1] == payload


def test_short_chunks_share_a_stream_and_long_ones_do_not(codec_of):
    wide = layout(layers=8, heads=4, width=32)
    short = ChunkInfo(wide, tokens=12, start=9)
    long = ChunkInfo(wide, tokens=256, start=9)
    assert len(coders(codec_of().encode(payload_of(short), short))) == 2
    assert len(coders(codec_of().encode(payload_of(long), long))) == 16
