from __future__ import annotations

import pytest

from lmcache_kit.layout import DTYPE_BYTES, KVLayout


def test_a_token_weighs_keys_and_values_of_all_layers_and_heads() -> None:
    llama = KVLayout(dtype="bfloat16", layers=32, kv_heads=8, head_dim=128)
    assert llama.token_bytes == 32 * 2 * 8 * 128 * 2 == 131_072


def test_a_token_of_a_latent_layout_has_one_side() -> None:
    latent = KVLayout(dtype="bfloat16", layers=61, kv_heads=1, head_dim=576, kind="mla")
    assert latent.token_bytes == 61 * 576 * 2


def test_a_payload_weighs_its_tokens() -> None:
    layout = KVLayout(dtype="float32", layers=2, kv_heads=3, head_dim=4)
    assert layout.payload_bytes(0) == 0
    assert layout.payload_bytes(7) == 7 * layout.token_bytes


@pytest.mark.parametrize(("dtype", "width"), sorted(DTYPE_BYTES.items()))
def test_each_dtype_has_its_width(dtype: str, width: int) -> None:
    assert KVLayout(dtype=dtype, layers=1, kv_heads=1, head_dim=1).token_bytes == 2 * width


def test_a_dtype_that_cannot_be_stored_has_no_weight() -> None:
    with pytest.raises(KeyError, match="int3"):
        _ = KVLayout(dtype="int3", layers=1, kv_heads=1, head_dim=1).token_bytes
