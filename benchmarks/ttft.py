"""Time to first token in vLLM: without the kit, with it on a miss, and with it on a hit.

One engine in this process serves all three. For the runs without the kit, the connector is taken
out of vLLM's scheduler and model runner. Runs alternate, each with a prompt of its own. Results are
medians of the pairs' ratios: of wall time, and of this process's CPU time, which depends less on
the load of the machine. vLLM's own prefix caching is off.

    python benchmarks/ttft.py [--model DIR] [--tokens 1500] [--pairs 9] [--dtype bfloat16] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parent.parent / ".cache" / "models" / "SmolLM2-135M-Instruct"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Bench:
    """An engine whose connector can be taken out and put back."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer import kv_transfer_state

        self.llm = LLM(
            str(options.model),
            dtype=options.dtype,
            max_model_len=options.tokens + 64,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_transfer_config=KVTransferConfig(
                kv_connector="LMCacheKitConnector",
                kv_role="kv_both",
                kv_connector_extra_config={
                    "lmcache.max_local_cpu_size": 2,
                    "lmcache.cache_socket": f"{folder}/cache.sock",
                    "lmcache.cache_linger_s": 1,
                },
            ),
        )
        self.first_token = SamplingParams(max_tokens=1, temperature=0)
        self.state: Any = kv_transfer_state
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.both = self.scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
        self.tokens = options.tokens
        self.random = random.Random(0)

    def prompt(self) -> list[int]:
        return [self.random.randrange(100, 40_000) for _ in range(self.tokens)]

    def ttft_s(self, prompt: list[int], *, kit: bool) -> tuple[float, float, int]:
        """Return seconds to the first token, CPU seconds, and the number of cached tokens."""
        both = self.both if kit else (None, None)
        self.scheduler.connector, self.state._KV_CONNECTOR_AGENT = both
        begun, begun_cpu = time.perf_counter(), time.process_time()
        (output,) = self.llm.generate(
            [{"prompt_token_ids": prompt}], self.first_token, use_tqdm=False
        )
        spent, spent_cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
        self.scheduler.connector, self.state._KV_CONNECTOR_AGENT = self.both
        return spent, spent_cpu, output.num_cached_tokens


def run(options: argparse.Namespace, folder: str) -> dict[str, object]:
    bench = Bench(options, folder)
    for kit in (False, True):
        bench.ttft_s(bench.prompt(), kit=kit)
    rows, cpu_ratios = [], []
    for number in range(options.pairs):
        order = (False, True) if number % 2 else (True, False)
        prompt = bench.prompt()
        spent, cpu = {}, {}
        for kit in order:
            tokens = prompt if kit else bench.prompt()
            spent[kit], cpu[kit], cached = bench.ttft_s(tokens, kit=kit)
            assert not cached
        hit_s, _, cached = bench.ttft_s(prompt, kit=True)
        assert cached == options.tokens - 1
        rows.append((spent[False], spent[True], hit_s))
        cpu_ratios.append(cpu[True] / cpu[False])
    without, miss, hit = ([row[i] for row in rows] for i in range(3))
    ratios = sorted(row[1] / row[0] for row in rows)
    return {
        "tokens": options.tokens,
        "pairs": options.pairs,
        "without_ms": round(statistics.median(without) * 1e3, 1),
        "miss_ms": round(statistics.median(miss) * 1e3, 1),
        "hit_ms": round(statistics.median(hit) * 1e3, 1),
        "miss_over_without": round(statistics.median(ratios), 4),
        "miss_over_without_range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "miss_over_without_cpu": round(statistics.median(cpu_ratios), 4),
        "without_over_hit": round(statistics.median(row[0] / row[2] for row in rows), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} is missing: run `make model`")
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        result = run(options, folder)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
