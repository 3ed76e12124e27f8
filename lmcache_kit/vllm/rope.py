"""The rotary embedding (RoPE) of the model that this process has loaded, for codecs."""

from __future__ import annotations

from lmcache_kit.interfaces.codec import Rope


def loaded_rope() -> Rope | None:
    """Return the model's rotary embedding, or None.

    None means that the model has no rotary embedding, several, or one of an unknown class. Codecs
    then encode K as it is, which costs bytes and nothing else.
    """
    from vllm.model_executor.layers import rotary_embedding

    modules = list(getattr(rotary_embedding, "_ROPE_DICT", {}).values())
    found = {_described(module) for module in modules}
    return found.pop() if len(found) == 1 else None


def _described(module: object) -> Rope | None:
    """Describe a module of a known class; a subclass may rotate K in another way."""
    kind = type(module).__name__
    if kind == "RotaryEmbedding":
        frequencies = ()
    elif kind == "Llama3RotaryEmbedding":
        frequencies = tuple(module._compute_inv_freq(module.base).tolist())  # type: ignore[attr-defined]
    elif kind == "YaRNScalingRotaryEmbedding":
        frequencies = tuple(module._compute_inv_freq(module.scaling_factor).tolist())  # type: ignore[attr-defined]
    else:
        return None
    return Rope(
        rotary_dim=int(module.rotary_dim),  # type: ignore[attr-defined]
        base=float(module.base),  # type: ignore[attr-defined]
        style="neox" if module.is_neox_style else "gptj",  # type: ignore[attr-defined]
        inv_freq=frequencies,
    )
