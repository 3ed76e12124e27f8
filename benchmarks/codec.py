"""The codec cachegen on a real model's KV: size, error of the model's predictions, and speed.

The KV is that of five texts of 1536 tokens, encoded in chunks of 256. The error is measured on the
192 tokens after them: the Kullback-Leibler divergence of the predictions, and the share of
positions whose likeliest token stays the same. Sizes are of whole blobs. LMCache's CacheGen encodes
the same KV in the same run if `make lmcache` has installed LMCache. Speed is the best CPU time of
several runs on one thread, beside memcpy.

    python benchmarks/codec.py [--model FOLDER] [--profile FILE] [--texts 5] [--json] [--picture]

Without ``--profile`` a profile is made from other texts and kept beside the model. ``--picture``
draws docs/img/codec_rate_distortion.svg.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lmcache_baseline
import numpy as np
import rate_distortion
import torch
from lmcache_kit_cachegen.codec import CacheGenCodec
from lmcache_kit_cachegen.options import CacheGenOptions
from lmcache_kit_cachegen.profile import Profile, load_profile
from lmcache_kit_cachegen.profiler import Profiler, default_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lmcache_kit.interfaces import ChunkInfo, Rope
from lmcache_kit.layout import KVLayout

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
PICTURE = ROOT / "docs" / "img" / "codec_rate_distortion.svg"
CONTEXT_TOKENS, AHEAD_TOKENS, CHUNK_TOKENS, SHORT_TOKENS = 1536, 192, 256, 12


class Row(NamedTuple):
    """Results of one codec: bits per value, ratio, error, ratio of short chunks, MB/s."""

    name: str
    bits: float
    ratio: float
    divergence: float
    agreement: float
    short_ratio: float
    encode_mbps: float
    decode_mbps: float


def held_out_texts() -> list[str]:
    """Return texts that are not in default_texts(): prose about software, C headers, a licence."""

    def readme(*names: str) -> str:
        return "".join(str(importlib.metadata.metadata(name).json["description"]) for name in names)

    include = Path(sysconfig.get_path("include"))
    headers = "".join(path.read_text() for path in sorted(include.glob("*object.h")))
    licences = [
        file.locate().read_text()  # type: ignore[attr-defined]
        for file in importlib.metadata.files("torch") or []
        if file.name.startswith(("LICENSE", "NOTICE")) and "dist-info" in str(file)
    ]
    return [
        readme("transformers"),
        readme("pydantic", "aiohttp", "click"),
        headers,
        max(licences, key=len),
        readme("zstandard", "pluggy", "blake3"),
    ]


class Model:
    """A causal model; its KV is ``[layers, 2, tokens, heads, width]`` in bfloat16 bits."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._half = _load(folder, torch.bfloat16)
        # Predictions in float32, so that rounding in the model does not hide the codec's error.
        self._full = _load(folder, torch.float32)

    def tokens(self, text: str) -> torch.Tensor:
        ids = self._tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] < CONTEXT_TOKENS + AHEAD_TOKENS:
            raise SystemExit(f"a text has only {ids.shape[1]} tokens")
        return ids[:, : CONTEXT_TOKENS + AHEAD_TOKENS]

    def kv(self, ids: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            cache = self._half(ids[:, :CONTEXT_TOKENS], use_cache=True).past_key_values
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        words = torch.stack(pairs).transpose(2, 3).contiguous().view(torch.int16)
        bits: np.ndarray = words.numpy().view(np.uint16)
        return bits

    def predictions(self, ids: torch.Tensor, kv: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).float().transpose(2, 3)
        cache = DynamicCache()
        for number, layer in enumerate(values):
            cache.update(layer[:1], layer[1:], number)
        with torch.no_grad():
            logits = self._full(ids[:, CONTEXT_TOKENS:], past_key_values=cache).logits[0]
        return torch.log_softmax(logits, -1)


def _load(folder: str, dtype: torch.dtype) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


class Bench:
    """Texts, their KV, and the model's predictions from the exact KV."""

    def __init__(self, folder: str, count: int) -> None:
        self.model = Model(folder)
        self.ids = [self.model.tokens(text) for text in held_out_texts()[:count]]
        self.kv = np.stack([self.model.kv(ids) for ids in self.ids])
        self.wanted = [
            self.model.predictions(ids, kv) for ids, kv in zip(self.ids, self.kv, strict=True)
        ]
        _, layers, _, _, heads, width = self.kv.shape
        self.layout = KVLayout("bfloat16", layers, heads, width)
        base = self.model._full.config.rope_parameters["rope_theta"]
        self.rope = Rope(width, float(base))

    def error(self, decoded: np.ndarray) -> tuple[float, float]:
        """Return the mean divergence in nats, and the share of unchanged likeliest tokens."""
        divergences, agreements = [], []
        for ids, kv, wanted in zip(self.ids, decoded, self.wanted, strict=True):
            got = self.model.predictions(ids, kv)
            divergences.append((wanted.exp() * (wanted - got)).sum(-1).mean().item())
            agreements.append((wanted.argmax(-1) == got.argmax(-1)).float().mean().item())
        return float(np.mean(divergences)), float(np.mean(agreements))

    def chunks(self, size: int, stride: int) -> list[tuple[int, int, ChunkInfo, bytes]]:
        """Return number of the text, start, description and payload of each chunk."""
        found = []
        for number, kv in enumerate(self.kv):
            for start in range(0, CONTEXT_TOKENS, stride):
                part = np.ascontiguousarray(kv[:, :, start : start + size])
                chunk = ChunkInfo(self.layout, size, start, self.rope)
                found.append((number, start, chunk, part.tobytes()))
        return found

    def run(self, name: str, codec: CacheGenCodec) -> Row:
        decoded = np.empty_like(self.kv)
        raw = encoded = 0
        for number, start, chunk, payload in self.chunks(CHUNK_TOKENS, CHUNK_TOKENS):
            blob, out = codec.encode(payload, chunk), bytearray(len(payload))
            codec.decode(blob, chunk, out)
            raw, encoded = raw + len(payload), encoded + len(blob)
            part = decoded[number, :, :, start : start + CHUNK_TOKENS]
            part[:] = np.frombuffer(out, np.uint16).reshape(part.shape)
        if codec.options.level == 0 and not np.array_equal(decoded, self.kv):
            raise SystemExit("level 0 is not exact")
        short = [item for item in self.chunks(SHORT_TOKENS, CHUNK_TOKENS) if item[1]]
        short_bytes = sum(len(codec.encode(payload, chunk)) for _, _, chunk, payload in short)
        short_ratio = sum(len(payload) for *_, payload in short) / short_bytes
        speed = self.speed(codec)
        return Row(
            name, 16 * encoded / raw, raw / encoded, *self.error(decoded), short_ratio, *speed
        )

    def speed(self, codec: CacheGenCodec) -> tuple[float, float]:
        """Return MB/s of KV for encode and decode, of a chunk that is not the first."""
        _, _, chunk, payload = self.chunks(CHUNK_TOKENS, CHUNK_TOKENS)[1]
        view, out = memoryview(bytearray(payload)), bytearray(len(payload))
        blob = codec.encode(view, chunk)
        return (
            len(payload) / best(lambda: codec.encode(view, chunk)) / 1e6,
            len(payload) / best(lambda: codec.decode(blob, chunk, out)) / 1e6,
        )

    def lmcache(self, bins: str) -> Row | None:
        name = "LMCache" if bins == "default" else f"LMCache, {bins} bins everywhere"
        with tempfile.TemporaryDirectory() as folder:
            source, target, short = (f"{folder}/{part}.npy" for part in ("kv", "out", "short"))
            np.save(source, self.kv)
            np.save(short, self.kv[:, :, :, CHUNK_TOKENS : CHUNK_TOKENS + SHORT_TOKENS])
            model = self.model.folder
            long = lmcache_baseline.measure("codec", model, source, bins, CHUNK_TOKENS, target)
            brief = lmcache_baseline.measure(
                "codec", model, short, bins, SHORT_TOKENS, f"{folder}/x.npy"
            )
            if long is None or brief is None:
                return None
            error = self.error(np.load(target))
        speed = (long["encode_mbps"], long["decode_mbps"])
        return Row(name, long["bits"], long["ratio"], *error, brief["ratio"], *speed)


def best(work: Callable[[], object], rounds: int = 25) -> float:
    """Return the lowest CPU time of this thread, in seconds."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return min(times)


def profile_of(folder: str, given: str | None) -> Profile:
    path = Path(given) if given else Path(folder).with_suffix(".lkcp")
    if not path.exists():
        print(f"making {path}; this takes minutes", file=sys.stderr)
        profiler = Profiler(folder, context=1024, ahead=256, rope_style="neox")
        for text in default_texts():
            profiler.add(text)
        path.write_bytes(profiler.profile().to_bytes())
    return load_profile(path)


def warm_up_seconds() -> float:
    """Return the CPU time of warm_up(), which uses compiled code of earlier runs."""
    begin = time.process_time()
    CacheGenCodec().warm_up()
    return time.process_time() - begin


def memcpy_mbps() -> float:
    source = np.ones(64 << 20, np.uint8)
    target = source.copy()
    return source.nbytes / best(lambda: np.copyto(target, source)) / 1e6


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    warm_up_s = warm_up_seconds()
    profile = profile_of(arguments.model, arguments.profile)
    bench = Bench(arguments.model, arguments.texts)
    rows = []
    cases: list[tuple[str, dict[str, Any], list[Profile]]] = [
        ("level 0, lossless", {"level": 0}, []),
        ("level 1, near-lossless", {"level": 1}, []),
        ("level 2, default", {"level": 2}, []),
        ("level 2, zstd", {"level": 2, "coder": "zstd"}, []),
        ("level 3, compact", {"level": 3}, []),
        ("level 1, profile", {"level": 1}, [profile]),
        ("level 2, profile", {"level": 2}, [profile]),
        ("level 3, profile", {"level": 3}, [profile]),
    ]
    for name, options, profiles in cases:
        codec = CacheGenCodec(CacheGenOptions(**options), profiles=profiles)
        rows.append(bench.run(name, codec))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    for bins in ("default", "32"):
        row = bench.lmcache(bins)
        if row is None:
            break
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
    return {
        "model": Path(arguments.model).name,
        "texts": len(bench.ids),
        "warm_up_s": warm_up_s,
        "memcpy_mbps": memcpy_mbps(),
        "rows": [row._asdict() for row in rows],
    }


def line(row: Row) -> str:
    return (
        f"{row.name:30} {row.bits:6.2f} {row.ratio:6.2f} {row.divergence:9.5f} "
        f"{100 * row.agreement:6.1f} {row.short_ratio:8.2f} {row.encode_mbps:8.0f} "
        f"{row.decode_mbps:8.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--profile", help="default: <model>.lkcp, made if missing")
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--picture", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments)
    if arguments.picture:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(rate_distortion.draw(figures["rows"]))
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        f"{figures['model']}, {figures['texts']} texts of {CONTEXT_TOKENS} tokens in chunks of "
        f"{CHUNK_TOKENS}; warm-up {figures['warm_up_s']:.1f} s, "
        f"memcpy {figures['memcpy_mbps']:.0f} MB/s\n"
    )
    print(
        f"{'codec':30} {'b/v':>6} {'ratio':>6} {'KL':>9} {'top-1 %':>7} {'12 tok.':>7} "
        f"{'enc MB/s':>8} {'dec MB/s':>8}"
    )
    for row in figures["rows"]:
        print(line(Row(**row)))


if __name__ == "__main__":
    main()
