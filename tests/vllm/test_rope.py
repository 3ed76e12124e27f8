"""The rotary embedding that codecs get, compared with how vLLM rotates K."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_kit.vllm.rope import loaded_rope

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    with set_current_vllm_config(VllmConfig()):
        yield


def load(parameters: dict[str, Any], *, neox: bool = True, head_dim: int = 64) -> Any:
    import torch
    from vllm.model_executor.layers import rotary_embedding

    return rotary_embedding.get_rope(
        head_dim, 512, is_neox_style=neox, rope_parameters=parameters, dtype=torch.float32
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_theta": 10000.0},
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
        LLAMA3,
        YARN,
    ],
    ids=["default", "partial", "llama3", "yarn"],
)
def test_its_frequencies_turn_k_as_vllm_does(parameters: dict[str, Any]) -> None:
    import torch

    module = load(parameters)
    rope = loaded_rope()
    assert rope is not None
    assert rope.rotary_dim == module.rotary_dim
    angles = 100 * torch.tensor(rope.frequencies)
    cos, sin = module.cos_sin_cache[100].chunk(2)
    length = torch.sqrt(cos**2 + sin**2)  # yarn makes K longer, too
    torch.testing.assert_close(cos / length, angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin / length, angles.sin(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("neox", "style"), [(True, "neox"), (False, "gptj")])
def test_it_says_which_values_make_pairs(neox: bool, style: str) -> None:
    load({"rope_theta": 10000.0}, neox=neox)
    rope = loaded_rope()
    assert rope is not None
    assert rope.style == style


def test_a_model_without_rotation_has_none() -> None:
    assert loaded_rope() is None


def test_a_model_with_two_rotations_has_none_to_tell() -> None:
    load({"rope_theta": 10000.0})
    load({"rope_theta": 1e6})
    assert loaded_rope() is None


def test_a_rotation_that_is_not_known_is_not_told() -> None:
    load({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert loaded_rope() is None
