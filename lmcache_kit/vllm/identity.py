"""Identify a model by everything that its KV depends on: its weights and its configuration.

Equal models agree wherever they run: paths, served names and the distribution of weights over files
are left out. What cannot be identified is shared with no other engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from blake3 import blake3

from lmcache_kit.vllm import weights

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_log = logging.getLogger("vllm.lmcache_kit")

_NOT_OF_KV = frozenset(
    {
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "model_name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
"""Fields of a Hugging Face configuration without effect on KV: origin, sampling and training."""

_MODEL_SETTINGS = (
    "dtype",
    "quantization",
    "override_attention_dtype",
    "disable_sliding_window",
    "architecture",
)
"""Fields of vLLM's ModelConfig that change KV beside those of the Hugging Face configuration."""

_ROPES_WITHOUT_LENGTH = frozenset({"default", "linear", "llama3", "mrope", "yarn"})
"""Kinds of RoPE that do not depend on ``max_model_len``."""


class Identity(NamedTuple):
    """Digests of weights and of the configuration, as hex of 16 bytes.

    ``weights`` has another form where files cannot be read: ``"dummy"``, ``"engine:ID"`` or
    ``"named:NAME"``.
    """

    weights: str
    config: str


def identify(
    vllm_config: VllmConfig, *, mode: Literal["sampled", "full"], weights_id: str = ""
) -> Identity:
    """Identify the model that vLLM serves. ``weights_id`` states the weights instead of reading.

    What cannot be identified gets the engine's own id, and the log says why.
    """
    identified = [f"named:{weights_id}"] if weights_id else []
    parts: list[Callable[[], str]] = [
        lambda: _weights(vllm_config, full=mode == "full"),
        lambda: config_digest(vllm_config.model_config),
    ]
    for part in parts[len(identified) :]:
        try:
            identified.append(part())
        # Code of vLLM, of Hugging Face and of models is asked here: no surprise may end a start.
        except Exception as error:  # noqa: BLE001
            _log.warning(
                "the model cannot be identified: %s. KV is kept for this engine alone, and not "
                "over a restart%s",
                str(error) or repr(error),
                "" if identified else "; state weights_id if equal names mean equal weights",
            )
            identified.append(f"engine:{vllm_config.kv_transfer_config.engine_id}")
    return Identity(*identified)


def config_digest(model: ModelConfig) -> str:
    """Return the digest of the settings that KV depends on, as hex of 16 bytes.

    Overrides such as ``--hf-overrides`` are part of the Hugging Face configuration by now.
    """
    facts = {
        "text": _without_ignored(_as_dict(model.hf_text_config)),
        "vllm": {name: _text(getattr(model, name, None)) for name in _MODEL_SETTINGS},
    }
    if quantization := getattr(model.hf_config, "quantization_config", None):
        facts["quantization"] = _without_ignored(_as_dict(quantization))
    if not set(_rope_types(facts["text"])) <= _ROPES_WITHOUT_LENGTH:
        facts["max_model_len"] = model.max_model_len
    encoded = json.dumps(_canonical(facts), sort_keys=True, separators=(",", ":"))
    _log.debug("configuration that KV depends on: %s", encoded)
    return blake3(encoded.encode()).hexdigest(16)


def local_folder(source: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Return the folder or file of a model or adapter on this host, or None.

    ``source`` is a path or the name of a repository of Hugging Face in its cache.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source, revision=revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _weights(vllm_config: VllmConfig, *, full: bool) -> str:
    """Raises OSError and ValueError for weights that cannot be read."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format) == "dummy":
        return "dummy"  # vLLM seeds them, so equal configurations have equal weights
    source = str(getattr(model, "model_weights", "") or model.model)
    folder = local_folder(source, model.revision, load.download_dir)
    files = weights.weight_files(folder) if folder else []
    if not files:
        raise FileNotFoundError(f"no weights are found at {source!r}")
    return weights.digest(files, full=full)


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def _without_ignored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _without_ignored(each)
            for name, each in value.items()
            if name not in _NOT_OF_KV and not str(name).startswith("_")
        }
    return value


def _canonical(value: Any) -> Any:
    """Return what JSON can hold: the same for equal configurations, in any process."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value if isinstance(value, str | int | float | bool | None) else _text(value)


def _rope_types(value: Any, inside: bool = False) -> Iterator[str]:
    """Yield the kinds of RoPE in a configuration, of any layer."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if inside and name in ("rope_type", "type") and isinstance(each, str):
                yield each
            yield from _rope_types(each, inside or str(name).startswith("rope_"))


def _text(value: Any) -> str:
    return "" if value is None else str(value)
