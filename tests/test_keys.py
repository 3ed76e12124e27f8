from __future__ import annotations

import os
import struct
import subprocess
import sys

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_kit.keys import Namespace, chain, chunk_key, pack_tokens
from lmcache_kit.layout import KVLayout

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LAYOUT = KVLayout(dtype="bfloat16", layers=32, kv_heads=8, head_dim=128)
PLAIN = Namespace(model="meta-llama/Llama-3.1-8B", layout=LAYOUT, chunk_size=256)
TAGGED = Namespace(
    model="modèle",
    layout=KVLayout(dtype="float16", layers=61, kv_heads=1, head_dim=576, kind="mla"),
    chunk_size=4,
    tensor_parallel=8,
    pipeline_parallel=2,
    weights="3e3b4d251f712d01bf3505c7c98b38a5",
    config="5a0f",
    generation="2",
    lora="adapter-7",
    cache_salt="tenant 1",
    tags=(("team", "red"), ("zone", "")),
)

GOLDEN = {
    "plain": "af37821d1ffa01d3539cf2d429cebb6eb977ff1a6db4bcb43493e1a8edf38e8b",
    "tagged": "e3f693b66c4a8b6d452de1eb6176d998a45e122750e8363b962b019705ece079",
}
GOLDEN_CHAIN = [
    "1f17b8968691c859f4c8b86107693241",
    "f483ec596200dfe03b850996361b1635",
    "7b89f65f45be88c7b9b2073b59eccce5",
]


def documented_digest(space: Namespace) -> bytes:
    """The namespace's encoding, written down a second time from its description: each field as
    its length and its bytes, numbers as 8 bytes, all little-endian, behind the domain's name."""
    parts: list[bytes] = []
    name = "" if space.weights else space.model
    identity = (name, space.weights, space.config, space.generation)
    for text in (*identity, space.layout.dtype, space.layout.kind):
        parts.append(text.encode("utf-8"))
    for number in (
        space.layout.layers,
        space.layout.kv_heads,
        space.layout.head_dim,
        space.tensor_parallel,
        space.pipeline_parallel,
        space.chunk_size,
    ):
        parts.append(number.to_bytes(8, "little"))
    parts += [space.lora.encode(), space.cache_salt.encode()]
    for name, value in space.tags:
        parts += [name.encode(), value.encode()]
    encoded = b"lmcache-kit/namespace/2"
    for part in parts:
        encoded += len(part).to_bytes(4, "little") + part
    return blake3(encoded).digest()


def documented_keys(space: bytes, tokens: list[int], chunk_size: int) -> list[bytes]:
    keys = []
    parent = space[:16]
    while tokens:
        head, tokens = tokens[:chunk_size], tokens[chunk_size:]
        packed = b"".join(token.to_bytes(4, "little") for token in head)
        parent = blake3(space + parent + packed).digest()[:16]
        keys.append(parent)
    return keys


def test_namespaces_have_the_digests_that_they_had_when_the_format_was_fixed() -> None:
    assert PLAIN.digest.hex() == GOLDEN["plain"]
    assert TAGGED.digest.hex() == GOLDEN["tagged"]


def test_chunks_have_the_keys_that_they_had_when_the_format_was_fixed() -> None:
    keys = [chunk.key.hex() for chunk in chain(TAGGED.digest, pack_tokens(range(1000, 1010)), 4)]
    assert keys == GOLDEN_CHAIN


@pytest.mark.parametrize("space", [PLAIN, TAGGED], ids=["plain", "tagged"])
def test_a_digest_is_what_its_description_says(space: Namespace) -> None:
    assert space.digest == documented_digest(space)


@patient
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(1, 7))
def test_a_chain_is_what_its_description_says(tokens: list[int], chunk_size: int) -> None:
    chunks = list(chain(PLAIN.digest, pack_tokens(tokens), chunk_size))
    assert [chunk.key for chunk in chunks] == documented_keys(PLAIN.digest, tokens, chunk_size)


@patient
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 7))
def test_a_chain_covers_the_tokens_without_gap_or_overlap(
    tokens: list[int], chunk_size: int
) -> None:
    chunks = list(chain(PLAIN.digest, pack_tokens(tokens), chunk_size))
    assert [chunk.start for chunk in chunks] == list(range(0, len(tokens), chunk_size))
    assert [chunk.end for chunk in chunks] == [*(c.start for c in chunks[1:]), len(tokens)]
    assert [chunk.parent for chunk in chunks] == [PLAIN.root, *(c.key for c in chunks[:-1])]


def test_a_chain_can_be_continued_where_it_was_cut() -> None:
    packed = pack_tokens(range(30))
    whole = list(chain(PLAIN.digest, packed, 8))
    assert list(chain(PLAIN.digest, packed, 8, start=16, parent=whole[1].key)) == whole[2:]


def test_no_tokens_have_no_chunks() -> None:
    assert list(chain(PLAIN.digest, b"", 8)) == []


def test_keys_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "from lmcache_kit.keys import *; from lmcache_kit.layout import KVLayout;"
        "n = Namespace('m', KVLayout('float32', 2, 3, 4), 8).variant(tags=(('b','1'),('a','2')));"
        "print(n.digest.hex(), [c.key.hex() for c in chain(n.digest, pack_tokens(range(20)), 8)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"lora": "x"},
        {"cache_salt": "x"},
        {"tags": (("x", ""),)},
    ],
)
def test_a_variant_has_a_namespace_of_its_own(change: dict[str, object]) -> None:
    variant = PLAIN.variant(**change)  # type: ignore[arg-type]
    assert variant.digest != PLAIN.digest


def test_the_variant_without_anything_is_the_base() -> None:
    assert PLAIN.variant() is PLAIN


def test_the_order_of_tags_does_not_matter() -> None:
    one = PLAIN.variant(tags=(("a", "1"), ("b", "2")))
    other = PLAIN.variant(tags=(("b", "2"), ("a", "1")))
    assert one.digest == other.digest


def test_fields_do_not_run_into_each_other() -> None:
    assert PLAIN.variant(lora="ab").digest != PLAIN.variant(lora="a", cache_salt="b").digest


def test_the_same_tokens_after_another_parent_have_another_key() -> None:
    tokens = pack_tokens([1, 2, 3])
    assert chunk_key(PLAIN.digest, PLAIN.root, tokens) != chunk_key(PLAIN.digest, b"x" * 16, tokens)


def test_tokens_are_packed_as_little_endian_words() -> None:
    tokens = [0, 1, 258, 2**32 - 1]
    assert pack_tokens(tokens) == struct.pack("<4I", *tokens)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_does_not_fit_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        pack_tokens([token])


def test_a_token_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError):
        pack_tokens(["7"])  # type: ignore[list-item]
