"""Which models are served, and how their KV is described."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.keys import Namespace
from lmcache_kit.layout import KVLayout
from lmcache_kit.vllm.identity import Identity
from lmcache_kit.vllm.model import Model, describe


def new_spec(**more: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shape = {"block_size": 16, "num_kv_heads": 4, "head_size": 64, "dtype": torch.bfloat16}
    return FullAttentionSpec(**(shape | more))


def description(
    spec: Any = None,
    *,
    groups: int = 1,
    cache_dtype: str = "auto",
    draft: str | None = None,
    served: str | list[str] | None = "smol",
    **parallel: int,
) -> Model:
    sizes = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    model = SimpleNamespace(
        model="/models/smol", served_model_name=served, get_total_num_kv_heads=lambda: 8
    )
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        speculative_config=SimpleNamespace(method=draft) if draft else None,
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        model_config=model,
    )
    group = SimpleNamespace(kv_cache_spec=spec or new_spec(), layer_names=["a", "b"])
    cache: Any = SimpleNamespace(kv_cache_groups=[group] * groups)
    return describe(config, cache)


def test_the_namespace_is_of_the_whole_model_and_the_layout_of_one_rank() -> None:
    model = description(tensor_parallel_size=2)
    whole = KVLayout("bfloat16", layers=2, kv_heads=8, head_dim=64)
    assert model.namespace(Identity("weights", "config"), 256) == Namespace(
        "smol", whole, 256, tensor_parallel=2, weights="weights", config="config"
    )
    assert model.layout == KVLayout("bfloat16", layers=2, kv_heads=4, head_dim=64)
    assert (model.world_size, model.block_tokens) == (2, 16)


@pytest.mark.parametrize(
    ("served", "name"), [("smol", "smol"), (["one", "two"], "one"), (None, "/models/smol")]
)
def test_the_served_name_names_the_model(served: Any, name: str) -> None:
    assert description(served=served).name == name


def test_a_draft_without_kv_of_its_own_is_served() -> None:
    assert description(draft="ngram").world_size == 1


@pytest.mark.parametrize(
    ("unsupported", "reason"),
    [
        ({"groups": 2}, "2 KV cache groups"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"prefill_context_parallel_size": 4}, "prefill_context_parallel_size is 4"),
        ({"draft": "eagle"}, "'eagle' keeps KV of its own"),
    ],
)
def test_what_is_not_served_is_refused_by_name(unsupported: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        description(**unsupported)


def test_other_kinds_of_kv_cache_are_refused_by_name() -> None:
    import torch
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16}
    with pytest.raises(UnsupportedModel, match="of kind MLAAttentionSpec"):
        description(MLAAttentionSpec(**shape))
    with pytest.raises(UnsupportedModel, match="of kind SlidingWindowSpec"):
        description(SlidingWindowSpec(**shape, sliding_window=128))


def test_quantised_kv_is_refused() -> None:
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    with pytest.raises(UnsupportedModel, match=r"quantised \(fp8, uint8\)"):
        description(new_spec(dtype=torch.uint8), cache_dtype="fp8")
    quantised = next(mode for mode in KVQuantMode if mode.name != "NONE")
    with pytest.raises(UnsupportedModel, match="quantised"):
        description(new_spec(kv_quant_mode=quantised))


def test_keys_and_values_of_different_size_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="differ in size"):
        description(new_spec(head_size_v=32))
