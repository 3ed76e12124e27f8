"""KV of a real model: size, error, and the effect on what the model says next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from lmcache_kit_cachegen.codec import CacheGenCodec
from lmcache_kit_cachegen.command import command
from lmcache_kit_cachegen.profile import load_profile
from lmcache_kit_cachegen.profiler import default_texts

from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import KVLayout

from .conftest import round_trip

pytestmark = pytest.mark.vllm  # torch, and the converted model

MODEL = Path(__file__).resolve().parents[3] / ".cache" / "models" / "SmolLM2-135M-Instruct"
LAYOUT = KVLayout("bfloat16", layers=30, kv_heads=3, head_dim=64)
ROPE = Rope(rotary_dim=64, base=100000.0)
CONTEXT_TOKENS, AHEAD_TOKENS = 512, 64


class Prompt:
    """A text's tokens, their KV and what follows, with any KV in its place."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        text = (MODEL.parents[2] / "LICENSE").read_text()
        ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids
        self._ids = ids[:, : CONTEXT_TOKENS + AHEAD_TOKENS]
        with torch.no_grad():
            cache = self._model(self._ids[:, :CONTEXT_TOKENS], use_cache=True).past_key_values
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        words = torch.stack(pairs).transpose(2, 3).to(torch.bfloat16).contiguous()
        self.kv = words.view(torch.int16).numpy().view(np.uint16)

    def payload(self, start: int, tokens: int) -> bytes:
        return np.ascontiguousarray(self.kv[:, :, start : start + tokens]).tobytes()

    def next_tokens(self, kv: np.ndarray) -> np.ndarray:
        """Log-probabilities, ``[AHEAD_TOKENS, vocabulary]``."""
        from transformers import DynamicCache

        torch = self._torch
        values = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).float().transpose(2, 3)
        cache = DynamicCache()
        for number, layer in enumerate(values):
            cache.update(layer[:1], layer[1:], number)
        with torch.no_grad():
            logits = self._model(self._ids[:, CONTEXT_TOKENS:], past_key_values=cache).logits[0]
        return torch.log_softmax(logits, -1).numpy().astype(np.float64)

    def close(self) -> None:
        self._torch.set_num_threads(self._threads)


@pytest.fixture(scope="module")
def prompt():
    assert (MODEL / "config.json").is_file(), f"{MODEL} is missing: run `make model`"
    prompt = Prompt()
    yield prompt
    prompt.close()


@pytest.mark.parametrize(
    ("level", "start", "tokens", "ratio"),
    [(0, 256, 256, 1.4), (1, 256, 256, 2.8), (2, 0, 256, 5.4), (2, 256, 256, 5.5),
     (3, 256, 256, 7.0), (2, 256, 12, 4.5), (2, 0, 12, 3.8)],
)  # fmt: skip
def test_real_kv_becomes_as_small_as_promised(codec_of, prompt, level, start, tokens, ratio):
    chunk = ChunkInfo(LAYOUT, tokens, start, ROPE)
    payload = prompt.payload(start, tokens)
    blob = codec_of(level).encode(payload, chunk)
    assert codec_of(level).describe(blob).ratio > ratio


def test_the_model_goes_on_as_before(codec_of, prompt):
    decoded = np.empty_like(prompt.kv)
    for start in (0, 256):
        chunk = ChunkInfo(LAYOUT, 256, start, ROPE)
        _, out = round_trip(codec_of(), prompt.payload(start, 256), chunk)
        part = decoded[:, :, start : start + 256]
        part[:] = np.frombuffer(out, np.uint16).reshape(part.shape)
    wanted, got = prompt.next_tokens(prompt.kv), prompt.next_tokens(decoded)
    divergence = (np.exp(wanted) * (wanted - got)).sum(axis=1).mean()
    assert 0 < divergence < 0.03
    assert (wanted.argmax(axis=1) == got.argmax(axis=1)).mean() > 0.9


def test_a_profile_made_from_text_makes_short_chunks_smaller(codec_of, prompt, tmp_path):
    texts = []
    for number, text in enumerate(default_texts()[8:10]):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        texts += ["--text", str(path)]
    out = tmp_path / "made.lkcp"
    arguments = ["profile", str(MODEL), *texts, "--out", str(out), "--context=192", "--ahead=16"]
    made = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    profile = load_profile(out)
    assert profile.rope == ROPE
    assert profile.name.hex() in made.output
    codec = CacheGenCodec(profiles=[profile])
    chunk = ChunkInfo(LAYOUT, 12, 256, ROPE)
    payload = prompt.payload(256, 12)
    blob, _ = round_trip(codec, payload, chunk)
    assert len(blob) < 0.9 * len(codec_of().encode(payload, chunk))
    assert codec.describe(blob).ratio > 5.3
