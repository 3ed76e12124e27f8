"""Profiler: measures a model's KV on text, and how sensitive the model is to errors in it.

Needs torch and transformers, which only this module imports.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_kit.errors import ConfigError
from lmcache_kit.interfaces import Rope
from lmcache_kit_cachegen.levels import DEFAULT, LEVELS, SINK_TOKENS
from lmcache_kit_cachegen.profile import Profile, build_profile
from lmcache_kit_cachegen.rope import cosines_and_sines, is_same_rope
from lmcache_kit_cachegen.tables import F32, F64

_MODULES = (
    "argparse", "asyncio.base_events", "heapq", "http.client", "json.decoder", "logging",
    "statistics", "tarfile", "textwrap", "unittest.case",
)  # fmt: skip
_TOPICS = 10
_SKIPPED_CHARACTERS = 2000
_SAMPLES = 2


def default_texts() -> list[str]:
    """Return prose and code of Python's standard library."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    prose = sorted(topics.values(), key=len, reverse=True)[:_TOPICS]
    code = [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    # Sources begin with a licence or a table of contents.
    return [*prose, *(text[_SKIPPED_CHARACTERS:] for text in code)]


class Profiler:
    """Accumulate the mean, the variance and the sensitivity of each channel over texts.

    The sensitivity is the diagonal of the Fisher information: the mean square of the gradients of
    log-probabilities, for tokens that the model itself would have written. To second order, an
    error of mean square ``e`` in a channel changes the model's predictions by ``e`` times half the
    sensitivity, as Kullback-Leibler divergence. Gradients are taken at KV with noise as large as
    the codec's error.
    """

    def __init__(self, model: str, *, context: int, ahead: int, rope_style: str) -> None:
        """Load the model.

        Raises ConfigError when torch or transformers is missing, or cannot load the model.
        """
        self._torch: Any = _require("torch")
        self._transformers: Any = _require("transformers")
        try:
            self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(model)
            self._model = self._transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=self._torch.float32
            ).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {model!r} cannot be loaded: {error}") from error
        self._name = Path(model).resolve().name if Path(model).is_dir() else model
        self._context, self._ahead = context, ahead
        self._rope = None if rope_style == "none" else _rope_of(self._model, rope_style)
        self._random = np.random.default_rng(0)
        self._torch.manual_seed(0)
        self.texts = 0
        self._sums: list[F64] = []

    def add(self, text: str) -> None:
        """Measure one text; a text that is too short is skipped."""
        ids = self._tokenizer(text, return_tensors="pt").input_ids[:, : self._context + self._ahead]
        if ids.shape[1] < self._context + self._ahead:
            return
        values = self._kv(ids[:, : self._context])
        derotated = self._rotate_k(values, -1.0)[:, :, SINK_TOKENS:].astype(np.float64)
        found = [derotated.mean(2), (derotated * derotated).mean(2), self._sensitivity(values, ids)]
        known = self._sums or [np.zeros_like(part) for part in found]
        self._sums = [a + b for a, b in zip(known, found, strict=True)]
        self.texts += 1

    def profile(self) -> Profile:
        """Return the profile of all texts so far. Raises ConfigError if none was long enough."""
        if not self.texts:
            raise ConfigError(
                f"no text has {self._context + self._ahead} tokens",
                hint="Give longer texts, or smaller --context and --ahead",
            )
        mean, square, sensitivity = (part / self.texts for part in self._sums)
        deviation = np.sqrt(np.maximum(square - mean * mean, 0))
        return build_profile(self._name, self._rope, mean, deviation, sensitivity)

    def _kv(self, ids: Any) -> F32:
        """Return the model's KV as ``[layers, 2, tokens, heads, head_dim]``."""
        with self._torch.no_grad():
            cache = self._model(ids, use_cache=True).past_key_values
        try:
            layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
            parts = [part.transpose(0, 1).numpy() for pair in layers for part in pair]
            values = np.stack(parts).astype(np.float32)
        except (AttributeError, ValueError) as error:
            raise ConfigError(f"model {self._name!r} has no uniform KV cache: {error}") from error
        return values.reshape(len(layers), 2, *values.shape[1:])

    def _rotate_k(self, values: F32, sign: float) -> F32:
        """Return ``values`` with the rotation of K undone (``sign`` -1) or applied (1)."""
        if self._rope is None:
            return values
        tokens, head_dim = values.shape[2], values.shape[4]
        cosines, sines = cosines_and_sines(self._rope, 0, tokens)
        cosines, sines = cosines[:, None], sines[:, None] * np.float32(sign)
        pairs = self._rope.rotary_dim // 2
        interleaved = self._rope.style == "gptj"
        one = np.arange(0, 2 * pairs, 2) if interleaved else np.arange(pairs)
        other = one + (1 if interleaved else pairs)
        assert head_dim >= 2 * pairs
        rotated = values.copy()
        a, b = values[:, 0][..., one], values[:, 0][..., other]
        rotated[:, 0][..., one] = a * cosines - b * sines
        rotated[:, 0][..., other] = b * cosines + a * sines
        return rotated

    def _sensitivity(self, values: F32, ids: Any) -> F64:
        """Return the sensitivity, ``[layers, 2, heads, head_dim]``, per predicted token."""
        derotated = self._rotate_k(values, -1.0)
        spread = derotated[:, :, SINK_TOKENS:].std(axis=2).mean(axis=(2, 3), keepdims=True)
        noise = self._random.uniform(-0.5, 0.5, derotated[:, :, SINK_TOKENS:].shape).astype(
            np.float32
        )
        derotated[:, :, SINK_TOKENS:] += (
            noise * spread[:, :, None] * np.float32(LEVELS[DEFAULT].step)
        )
        noisy = self._torch.from_numpy(self._rotate_k(derotated, 1.0))
        leaves = [
            part.transpose(0, 1)[None].clone().requires_grad_() for part in noisy.flatten(0, 1)
        ]
        cache = self._transformers.DynamicCache()
        for layer, (keys, vals) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
            cache.update(keys, vals, layer)
        logits = self._model(ids[:, self._context :], past_key_values=cache).logits[0]
        logs = self._torch.log_softmax(logits, -1)
        total: Any = 0.0
        for left in reversed(range(_SAMPLES)):
            drawn = self._torch.multinomial(logs.detach().exp(), 1)
            score = logs.gather(1, drawn).sum()
            slopes = self._torch.autograd.grad(score, leaves, retain_graph=left > 0)
            stacked = np.stack([slope[0].transpose(0, 1).numpy() for slope in slopes])
            rotated = self._rotate_k(stacked.reshape(values.shape), -1.0)[:, :, SINK_TOKENS:]
            total = total + np.square(rotated, dtype=np.float64).sum(axis=2)
        result: F64 = total / (_SAMPLES * len(logs))
        return result


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"making a profile needs {name}, which cannot be imported: {error}",
            hint='pip install "lmcache-kit-cachegen[profile]"',
        ) from error


def _rope_of(model: Any, style: str) -> Rope | None:
    """Return the rotary embedding that the model's ``inv_freq`` buffer describes, or None."""
    found = next((m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")), None)
    if found is None:
        return None
    listed = tuple(float(value) for value in found)
    exact = Rope(2 * len(listed), style=style, inv_freq=listed)  # type: ignore[arg-type]
    parameters = getattr(model.config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta", getattr(model.config, "rope_theta", None))
    if base is None:
        return exact
    plain = Rope(2 * len(listed), float(base), style)  # type: ignore[arg-type]
    return plain if is_same_rope(plain, exact) else exact
