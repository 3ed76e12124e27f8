"""What tells models apart, and what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_kit.vllm import weights

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


class Text(dict[str, Any]):
    """Stands for a Hugging Face configuration."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def model_config(path: Path | str = "m", *, config: Any = None, **more: Any) -> Any:
    text = Text(CONFIG | (config or {}))
    fields: dict[str, Any] = {
        "model": str(path),
        "model_weights": "",
        "revision": None,
        "hf_text_config": text,
        "hf_config": SimpleNamespace(),
        "dtype": "torch.bfloat16",
        "quantization": None,
        "override_attention_dtype": None,
        "disable_sliding_window": False,
        "architecture": "LlamaForCausalLM",
        "max_model_len": 4096,
    }
    return SimpleNamespace(**(fields | more))


def config_digest(**more: Any) -> str:
    from lmcache_kit.vllm.identity import config_digest

    return config_digest(model_config(**more))


def identity(path: Path | str, load_format: str = "auto", **more: Any) -> Any:
    from lmcache_kit.vllm.identity import identify

    config: Any = SimpleNamespace(
        model_config=model_config(path),
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
        kv_transfer_config=SimpleNamespace(engine_id="engine-1"),
    )
    return identify(config, **({"mode": "sampled"} | more))


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_001.0}}},
        {"config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
        {"config": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}},
        {"config": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
        {"config": {"rms_norm_eps": 1e-6}},
        {"config": {"a_field_of_tomorrow": 1}},
        {"config": {"layer_types": ["full_attention", "sliding_attention"]}},
        {"dtype": "torch.float16"},
        {"quantization": "fp8"},
        {"hf_config": SimpleNamespace(quantization_config={"bits": 4})},
        {"disable_sliding_window": True},
        {"architecture": "MistralForCausalLM"},
    ],
    ids=str,
)
def test_settings_that_change_kv_tell_models_apart(change: dict[str, Any]) -> None:
    assert config_digest(**change) != config_digest()


@pytest.mark.parametrize(
    "change",
    [
        {"path": "/elsewhere/m"},
        {"config": {"_name_or_path": "/elsewhere", "transformers_version": "9"}},
        {"config": {"eos_token_id": [1, 2], "use_cache": False, "torch_dtype": "float32"}},
        {"config": {"hidden_size": 64}},
        {"max_model_len": 512},
    ],
    ids=str,
)
def test_settings_that_do_not_change_kv_leave_models_equal(change: dict[str, Any]) -> None:
    assert config_digest(**change) == config_digest()


def test_the_length_counts_where_the_rotary_embedding_depends_on_it() -> None:
    long = {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}
    one, two = (config_digest(config=long, max_model_len=length) for length in (4096, 131_072))
    assert one != two


def test_the_order_of_fields_and_the_kind_of_sequences_do_not_count() -> None:
    one = config_digest(config={"layer_types": ("a", "b"), "x": 1})
    two = config_digest(config={"x": 1, "layer_types": ["a", "b"]})
    assert one == two


def test_a_digest_is_the_same_in_every_process() -> None:
    assert config_digest() == "9259a6222d72893b922869d84846d436"


# Weights.


def tensors(seed: int = 0, count: int = 6) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (64, 200)
    return {f"layers.{i}.weight": torch.randn(shape, generator=generator) for i in range(count)}


def save(folder: Path, named: dict[str, Any], shards: int = 1, **metadata: str) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    names = list(named)
    for shard in range(shards):
        part = {name: named[name] for name in names[shard::shards]}
        save_file(part, str(folder / f"model-{shard:05}.safetensors"), metadata or None)
    return folder


def digest(folder: Path, *, full: bool = False) -> str:
    return weights.digest(weights.weight_files(folder), full=full)


@pytest.mark.parametrize("full", [False, True])
def test_equal_weights_agree_in_other_folders_and_other_shards(tmp_path: Path, full: bool) -> None:
    one = save(tmp_path / "one", tensors())
    two = save(tmp_path / "two", tensors(), shards=3, format="pt")
    assert digest(one, full=full) == digest(two, full=full)


@pytest.mark.parametrize("full", [False, True])
def test_other_weights_differ(tmp_path: Path, full: bool) -> None:
    changed = tensors() | {"layers.3.weight": tensors(seed=1)["layers.3.weight"]}
    renamed = tensors()
    renamed["layers.9.weight"] = renamed.pop("layers.3.weight")
    halved = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    folders = [
        save(tmp_path / str(number), each)
        for number, each in enumerate([tensors(), changed, renamed, halved, tensors(count=5)])
    ]
    assert len({digest(folder, full=full) for folder in folders}) == len(folders)


def test_a_single_edited_element_is_found_by_a_full_digest(tmp_path: Path) -> None:
    edited = tensors()
    edited["layers.3.weight"][20, 100] += 1
    one, two = save(tmp_path / "one", tensors()), save(tmp_path / "two", edited)
    assert digest(one, full=True) != digest(two, full=True)


def test_a_sampled_digest_and_a_full_one_are_never_equal(tmp_path: Path) -> None:
    folder = save(tmp_path / "one", {"small": tensors()["layers.0.weight"][:1].clone()})
    assert digest(folder) != digest(folder, full=True)


@pytest.mark.parametrize("suffix", [".bin", ".gguf", ".pt"])
def test_other_formats_are_read_as_whole_files(tmp_path: Path, suffix: str) -> None:
    for name, value in (("one", b"a"), ("two", b"a"), ("three", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"weights{suffix}").write_bytes(value * 100_000)
        (tmp_path / name / "training_args.bin").write_bytes(name.encode())
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "three")


@pytest.mark.parametrize("damage", ["random", "cut", "header"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path / "one", tensors())
    (file,) = weights.weight_files(folder)
    content = file.read_bytes()
    (length,) = [int.from_bytes(content[:8], "little")]
    bad = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}).encode()
    damaged = {
        "random": b"\xff" * 64,
        "cut": content[: length + 100],
        "header": len(bad).to_bytes(8, "little") + bad + bytes(8),
    }[damage]
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model-00000\.safetensors is (no safetensors|cut)"):
        digest(folder)


def test_models_are_identified_by_weights_and_configuration(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one", tensors()), save(tmp_path / "two", tensors(seed=1))
    copied = Path(shutil.copytree(one, tmp_path / "copied"))
    assert identity(one) == identity(copied) != identity(two)
    assert identity(one, mode="full") != identity(one)


def test_dummy_weights_are_no_real_ones(tmp_path: Path) -> None:
    assert identity(save(tmp_path / "one", tensors()), "dummy").weights == "dummy"


def test_weights_that_are_stated_are_not_read(tmp_path: Path) -> None:
    assert identity(tmp_path / "nowhere", weights_id="mine").weights == "named:mine"


def test_weights_that_cannot_be_found_are_shared_with_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert identity(empty).weights == "engine:engine-1"
    assert identity("nobody-at-all/model-that-is-nowhere").weights == "engine:engine-1"
    assert "the model cannot be identified: no weights are found at" in caplog.text
    assert "state weights_id" in caplog.text


def test_a_configuration_of_another_kind_costs_sharing_and_not_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lmcache_kit.vllm.identity import identify

    config: Any = SimpleNamespace(
        model_config=object(), kv_transfer_config=SimpleNamespace(engine_id="e")
    )
    assert identify(config, mode="sampled", weights_id="w") == ("named:w", "engine:e")
    assert "the model cannot be identified" in caplog.text
