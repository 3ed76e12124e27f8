"""KV of a vLLM model: its layout and namespace, or the reason why it cannot be cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_kit.errors import UnsupportedModel
from lmcache_kit.keys import Namespace
from lmcache_kit.layout import KVLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from lmcache_kit.vllm.identity import Identity

_DTYPES = ("bfloat16", "float16", "float32")
_DRAFTS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True, slots=True)
class Model:
    """The KV of a model, as the cache sees it.

    ``name`` is the name under which the model is served. ``whole`` is the layout of the whole model
    and ``layout`` that of one rank. ``block_tokens`` is vLLM's block size.
    """

    name: str
    whole: KVLayout
    layout: KVLayout
    block_tokens: int
    world_size: int

    def namespace(self, identity: Identity, chunk_size: int) -> Namespace:
        """Return the base namespace of the model's KV."""
        return Namespace(
            model=self.name,
            layout=self.whole,
            chunk_size=chunk_size,
            tensor_parallel=self.world_size,
            weights=identity.weights,
            config=identity.config,
        )


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Model:
    """Describe the KV of the model that vLLM serves.

    Both roles of the connector get the same arguments, and so the same answer. Raises
    UnsupportedModel for a model whose KV is not plain keys and values of every layer.
    """
    _check_parallelism(vllm_config)
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedModel(
            f"it has {len(groups)} KV cache groups, as hybrid models do; 1 is supported"
        )
    spec = groups[0].kv_cache_spec
    _check_spec(spec, vllm_config.cache_config.cache_dtype)
    tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
    model = vllm_config.model_config
    dtype = str(spec.dtype).removeprefix("torch.")
    layers = len(groups[0].layer_names)
    whole = KVLayout(dtype, layers, model.get_total_num_kv_heads(), spec.head_size)
    names = model.served_model_name or model.model
    return Model(
        name=names if isinstance(names, str) else names[0],
        whole=whole,
        layout=KVLayout(dtype, layers, spec.num_kv_heads, spec.head_size),
        block_tokens=spec.block_size,
        world_size=tensor_parallel,
    )


def _check_parallelism(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for kind in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel, kind, 1)) > 1:
            raise UnsupportedModel(f"{kind} is {size}; 1 is supported")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS_WITHOUT_KV:
        raise UnsupportedModel(
            f"speculative decoding with {speculative.method!r} keeps KV of its own; "
            f"supported are {', '.join(_DRAFTS_WITHOUT_KV)}"
        )


def _check_spec(spec: Any, cache_dtype: str) -> None:
    kind = type(spec).__name__
    if kind != "FullAttentionSpec":
        raise UnsupportedModel(f"its KV cache is of kind {kind}; FullAttentionSpec is supported")
    dtype = str(spec.dtype).removeprefix("torch.")
    quantised = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE") != "NONE"
    if quantised or dtype not in _DTYPES:
        raise UnsupportedModel(
            f"its KV cache is quantised ({cache_dtype}, {dtype}); "
            f"supported are {', '.join(_DTYPES)}"
        )
    if spec.head_size_v != spec.head_size or spec.num_heads != spec.num_kv_heads:
        raise UnsupportedModel(
            f"keys and values of its KV cache differ in size ({spec.head_size} and "
            f"{spec.head_size_v}), or its heads are packed; equal, unpacked ones are supported"
        )
