"""Profiles from text: what a model's KV looks like, and where the model notices errors.

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
from lmcache_kit_cachegen.rope import cosines_and_sines, same_rotation
from lmcache_kit_cachegen.tables import F32, F64

_MODULES = (
    "argparse", "asyncio.base_events", "heapq", "http.client", "json.decoder", "logging",
    "statistics", "tarfile", "textwrap", "unittest.case",
)  # fmt: skip
_TOPICS = 10
_SKIPPED_CHARACTERS = 2000
_SAMPLES = 2


def default_texts() -> list[str]:
    """Prose and code that every Python has."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    prose = sorted(topics.values(), key=len, reverse=True)[:_TOPICS]
    code = [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    # Sources begin with a licence or a table of contents.
    return [*prose, *(text[_SKIPPED_CHARACTERS:] for text in code)]


class Measuring:
    """Adds up, over texts, the mean, the variance and the sensitivity of each channel.

    The sensitivity is the diagonal of the Fisher information: the mean square of the gradients of
    log-probabilities, for tokens that the model itself would have written. To second order, an
    error of mean square ``e`` in a channel changes the model's predictions by ``e`` times half of
    it, as Kullback-Leibler divergence. It is taken where the codec works, with noise of its size.
    """

    def __init__(self, model: str, *, context: int, ahead: int, rope_style: str) -> None:
        """Raises ConfigError without torch and transformers, and for a model they cannot load."""
        self._torch: Any = _needed("torch")
        self._transformers: Any = _needed("transformers")
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
        """Measure one text; one that is too short is left out."""
        ids = self._tokenizer(text, return_tensors="pt").input_ids[:, : self._context + self._ahead]
        if ids.shape[1] < self._context + self._ahead:
            return
        values = self._kv(ids[:, : self._context])
        still = self._turned(values, -1.0)[:, :, SINK_TOKENS:].astype(np.float64)
        found = [still.mean(2), (still * still).mean(2), self._sensitivity(values, ids)]
        known = self._sums or [np.zeros_like(part) for part in found]
        self._sums = [a + b for a, b in zip(known, found, strict=True)]
        self.texts += 1

    def profile(self) -> Profile:
        """Raises ConfigError if no text was long enough."""
        if not self.texts:
            raise ConfigError(
                f"no text has {self._context + self._ahead} tokens",
                hint="Give longer ones, or smaller --context and --ahead",
            )
        mean, square, sensitivity = (part / self.texts for part in self._sums)
        deviation = np.sqrt(np.maximum(square - mean * mean, 0))
        return build_profile(self._name, self._rope, mean, deviation, sensitivity)

    def _kv(self, ids: Any) -> F32:
        """``[layers, 2, tokens, heads, head_dim]``, as a cache holds it."""
        with self._torch.no_grad():
            cache = self._model(ids, use_cache=True).past_key_values
        try:
            layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
            parts = [part.transpose(0, 1).numpy() for pair in layers for part in pair]
            values = np.stack(parts).astype(np.float32)
        except (AttributeError, ValueError) as error:
            raise ConfigError(f"model {self._name!r} has no uniform KV cache: {error}") from error
        return values.reshape(len(layers), 2, *values.shape[1:])

    def _turned(self, values: F32, sign: float) -> F32:
        """With the rotation of K undone (-1) or done (1)."""
        if self._rope is None:
            return values
        tokens, head_dim = values.shape[2], values.shape[4]
        cosines, sines = cosines_and_sines(self._rope, 0, tokens)
        cosines, sines = cosines[:, None], sines[:, None] * np.float32(sign)
        pairs = self._rope.rotary_dim // 2
        near = self._rope.style == "gptj"
        one = np.arange(0, 2 * pairs, 2) if near else np.arange(pairs)
        other = one + (1 if near else pairs)
        assert head_dim >= 2 * pairs
        turned = values.copy()
        a, b = values[:, 0][..., one], values[:, 0][..., other]
        turned[:, 0][..., one] = a * cosines - b * sines
        turned[:, 0][..., other] = b * cosines + a * sines
        return turned

    def _sensitivity(self, values: F32, ids: Any) -> F64:
        """``[layers, 2, heads, head_dim]``, per predicted token."""
        still = self._turned(values, -1.0)
        spread = still[:, :, SINK_TOKENS:].std(axis=2).mean(axis=(2, 3), keepdims=True)
        noise = self._random.uniform(-0.5, 0.5, still[:, :, SINK_TOKENS:].shape).astype(np.float32)
        still[:, :, SINK_TOKENS:] += noise * spread[:, :, None] * np.float32(LEVELS[DEFAULT].step)
        noisy = self._torch.from_numpy(self._turned(still, 1.0))
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
            turned = self._turned(stacked.reshape(values.shape), -1.0)[:, :, SINK_TOKENS:]
            total = total + np.square(turned, dtype=np.float64).sum(axis=2)
        result: F64 = total / (_SAMPLES * len(logs))
        return result


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"making a profile needs {name}, which cannot be imported: {error}",
            hint='pip install "lmcache-kit-cachegen[profile]"',
        ) from error


def _rope_of(model: Any, style: str) -> Rope | None:
    """The rotation that the model's own buffer describes; None if it has none."""
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
    return plain if same_rotation(plain, exact) else exact
