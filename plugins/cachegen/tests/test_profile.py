"""Profiles: what they save, which chunks they are for, and what a profile file may be."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from lmcache_kit_cachegen.codec import CacheGenCodec
from lmcache_kit_cachegen.options import CacheGenOptions
from lmcache_kit_cachegen.profile import MAX_FILE_BYTES, Profile, load_profile, parse_profile

from lmcache_kit.errors import BlobMismatch, ConfigError, UnknownProfile
from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import KVLayout

from .conftest import ROPE, layout, payload_of, round_trip, to_values


def saved(profile: Profile, folder) -> str:
    path = folder / "model.lkcp"
    path.write_bytes(profile.to_bytes())
    return str(path)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 12, 256])
def test_a_chunk_comes_back_with_a_profile(profile, level, tokens):
    codec = CacheGenCodec(CacheGenOptions(level=level), profiles=[profile])
    chunk = ChunkInfo(layout(), tokens, start=300, rope=ROPE)
    payload = payload_of(chunk)
    blob, out = round_trip(codec, payload, chunk)
    assert codec.describe(blob).profile == profile.name.hex()
    wanted, got = to_values(payload, chunk), to_values(out, chunk)
    assert np.abs(wanted - got).max() < 2
    assert len(blob) < len(payload) / (1.5 if tokens > 1 else 1)


def test_a_short_chunk_needs_no_side_information(codec_of, profile):
    chunk = ChunkInfo(layout(layers=2), tokens=12, start=300, rope=ROPE)
    payload = payload_of(chunk)
    with_it = CacheGenCodec(profiles=[profile])
    alone = len(codec_of().encode(payload, chunk))
    assert len(with_it.encode(payload, chunk)) < 0.8 * alone


def test_a_profile_read_from_a_file_is_the_same(profile, tmp_path):
    codec = CacheGenCodec(CacheGenOptions(profiles=(saved(profile, tmp_path),)))
    chunk = ChunkInfo(layout(), tokens=12, start=300, rope=ROPE)
    payload = payload_of(chunk)
    assert codec.encode(payload, chunk) == CacheGenCodec(profiles=[profile]).encode(payload, chunk)


def test_decoding_needs_the_profile_and_says_which(codec_of, profile):
    chunk = ChunkInfo(layout(), tokens=12, start=300, rope=ROPE)
    blob = CacheGenCodec(profiles=[profile]).encode(payload_of(chunk), chunk)
    with pytest.raises(UnknownProfile, match=f"needs profile {profile.name.hex()}"):
        codec_of().decode(blob, chunk, bytearray(chunk.payload_bytes))


@pytest.mark.parametrize(
    "other",
    [
        ChunkInfo(layout(layers=3), tokens=12, start=300, rope=ROPE),
        ChunkInfo(layout(width=32), tokens=12, start=300, rope=ROPE),
        ChunkInfo(layout(heads=3), tokens=12, start=300, rope=ROPE),
        ChunkInfo(layout(), tokens=12, start=300, rope=Rope(16, base=5e5)),
        ChunkInfo(layout(), tokens=12, start=300),
        ChunkInfo(layout(), tokens=12, start=300, rope=ROPE, first_head=1),
        ChunkInfo(KVLayout("bfloat16", 2, 1, 16, "mla"), tokens=12, start=300),
    ],
)
def test_a_chunk_of_another_model_does_without(profile, other):
    codec = CacheGenCodec(profiles=[profile])
    random = np.random.default_rng(0).normal(size=other.payload_bytes // 2).astype(np.float32)
    payload = (random.view(np.uint32) >> 16).astype("<u2").tobytes()
    assert codec.describe(codec.encode(payload, other)).profile == ""


def test_a_rank_takes_its_heads_from_the_profile(profile):
    codec = CacheGenCodec(profiles=[profile])
    whole = ChunkInfo(layout(), tokens=30, start=300, rope=ROPE)
    words = np.frombuffer(payload_of(whole), "<u2").reshape(2, 2, 30, 2, 16)
    for head in (0, 1):
        chunk = ChunkInfo(layout(heads=1), tokens=30, start=300, rope=ROPE, first_head=head)
        payload = np.ascontiguousarray(words[:, :, :, head : head + 1]).tobytes()
        blob, _ = round_trip(codec, payload, chunk)
        assert codec.describe(blob).profile
        assert len(blob) < len(payload) / 4


def test_ranks_cannot_decode_each_others_blobs_into_nonsense(profile):
    codec = CacheGenCodec(profiles=[profile])
    chunk = ChunkInfo(layout(heads=1), tokens=30, start=300, rope=ROPE)
    blob = codec.encode(payload_of(chunk), chunk)
    beyond = msgspec.structs.replace(chunk, first_head=2)
    with pytest.raises(BlobMismatch, match="is not of the blob's model"):
        codec.decode(blob, beyond, bytearray(chunk.payload_bytes))


def test_a_chunk_unlike_the_profiles_text_is_kept_within_its_own_steps(profile):
    codec = CacheGenCodec(profiles=[profile])
    chunk = ChunkInfo(layout(), tokens=100, start=300, rope=ROPE)
    values = 300 * np.random.default_rng(0).normal(size=chunk.payload_bytes // 2)
    payload = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    blob, _ = round_trip(codec, payload, chunk)
    assert 4 < len(payload) / len(blob) < 7


def changed(profile: Profile, **fields: object) -> bytes:
    return msgspec.structs.replace(profile, **fields).to_bytes()


def test_anything_but_a_whole_profile_is_refused(profile):
    good = profile.to_bytes()
    assert parse_profile(good).name == profile.name
    short = profile.steps[:-4]
    for data, reason in [
        (b"", "not a profile"),
        (b"\x80\x04K\x01.", "not a profile"),
        (good[:-1], "not a profile"),
        (good + b"\0", "not a profile"),
        (changed(profile, version=2), "version 2; known"),
        (changed(profile, format="x"), "'x' version 1"),
        (changed(profile, steps=short), "reshape"),
        (changed(profile, steps=b"\0" * len(profile.steps)), "not all positive numbers"),
        (changed(profile, means=b"\xff" * len(profile.means)), "not all positive numbers"),
        (changed(profile, tables=b"\xff" * len(profile.tables)), "unknown tables"),
        (changed(profile, tables=b"\0" * len(profile.tables)), "unknown tables"),
        (changed(profile, layers=-2), "it is not a profile"),
    ]:
        with pytest.raises(ValueError, match=reason):
            parse_profile(data)


def test_a_bad_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "bad.lkcp"
    path.write_bytes(b"\x93abc")
    with pytest.raises(
        ConfigError, match=r"bad\.lkcp: it is not a profile.*cachegen profile MODEL"
    ):
        load_profile(path)
    with pytest.raises(ConfigError, match=r"absent\.lkcp: No such file"):
        CacheGenCodec(CacheGenOptions(profiles=(str(tmp_path / "absent.lkcp"),)))
    monkeypatch.setattr("lmcache_kit_cachegen.profile.MAX_FILE_BYTES", 3)
    with pytest.raises(ConfigError, match="larger than 3 bytes"):
        load_profile(path)
    assert MAX_FILE_BYTES > 1 << 20


def test_a_changed_byte_of_a_file_is_refused_or_makes_another_profile(profile):
    whole = profile.to_bytes()
    for place in [*range(400), *range(400, len(whole), len(whole) // 100)]:
        data = bytearray(whole)
        data[place] ^= 0xFF
        try:
            found = parse_profile(bytes(data))
        except ValueError:
            continue
        assert found.name != profile.name, f"byte {place}"
