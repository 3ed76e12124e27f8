"""Time to first token of a vLLM while KV is moved away from its cache.

vLLM runs in this process, with the kit's connector, and spawns a cache process. The cache also
holds a gigabyte of KV of another model, which a controller moves (``copy``) to a second cache
process. Requests run one after another: some without a move, then as many as start during a move,
in turn, for each transport. A prompt is either in the cache (``hit``) or short and not in the cache
(``miss``). vLLM has one thread (OMP_NUM_THREADS=1); copying and verifying need a core as well. The
destination deletes its copy after every move. vLLM's own prefix caching is off.

    python benchmarks/move_serving.py [--model DIR] [--gib 1] [--rounds 12] [--json]
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
from typing import Any, NamedTuple

import ttft
from fleet import LLAMA, Fleet, settings, store, until, worker
from two_caches import channels

from lmcache_kit.config import KitConfig
from lmcache_kit.keys import Namespace

BIG = Namespace("bench/llama-8b", LLAMA, 256)
CHUNK_BYTES = LLAMA.payload_bytes(256)
DTYPE = "bfloat16"
KINDS = ("hit", "miss")
WARM_UPS = 2


class Request(NamedTuple):
    """A request: its start in seconds since the epoch, and its time to first token."""

    begun: float
    seconds: float


class Serving:
    """A vLLM with the connector in this process."""

    def __init__(self, options: argparse.Namespace, keys: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        self._llm = LLM(
            str(options.model),
            dtype=DTYPE,
            max_model_len=options.hit_tokens + 64,
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_transfer_config=KVTransferConfig(
                kv_connector="LMCacheKitConnector",
                kv_role="kv_both",
                kv_connector_extra_config={f"lmcache.{key}": value for key, value in keys.items()},
            ),
        )
        self._first_token = SamplingParams(max_tokens=1, temperature=0)
        self._random = random.Random(0)
        self._cached_prompt = self._prompt(options.hit_tokens)
        self._miss_tokens = options.miss_tokens
        self._generate(self._cached_prompt)

    def send(self, kind: str) -> Request:
        """Send a prompt that is in the cache, or one that is not."""
        hit = kind == "hit"
        prompt = self._cached_prompt if hit else self._prompt(self._miss_tokens)
        begun, clock = time.time(), time.perf_counter()
        cached = self._generate(prompt)
        spent = time.perf_counter() - clock
        assert cached == (len(prompt) - 1 if hit else 0), (kind, cached)
        return Request(begun, spent)

    def _generate(self, prompt: list[int]) -> int:
        (output,) = self._llm.generate(
            [{"prompt_token_ids": prompt}], self._first_token, use_tqdm=False
        )
        return int(output.num_cached_tokens or 0)

    def _prompt(self, tokens: int) -> list[int]:
        return [self._random.randrange(100, 40_000) for _ in range(tokens)]


class Alternation:
    """Requests without and during a move, in turn."""

    def __init__(self, fleet: Fleet, serving: Serving, source: str, tokens: range) -> None:
        self._controller = fleet.controller
        self._serving = serving
        self._source = source
        self._tokens = tokens

    def measure(self, channel: str, kind: str, rounds: int) -> dict[str, Any]:
        """Measure one kind of requests and moves by one transport."""
        before = _load()
        quiet, moving, moves, shares = [], [], [], []
        for number in range(rounds + WARM_UPS):
            alone, beside, event = self._round(channel, kind)
            if number < WARM_UPS:
                continue
            transfer = event["progress"][0]["transfer"]
            assert transfer["transport"] == channel, transfer
            quiet += alone
            moving += beside
            moves.append(event["ended"] - event["started"])
            shares += [
                min(1.0, (event["ended"] - request.begun) / request.seconds) for request in beside
            ]
        times = [[request.seconds for request in some] for some in (quiet, moving)]
        without, beside_move = (statistics.median(some) for some in times)
        return {
            "channel": channel,
            "requests_of": kind,
            "rounds": rounds,
            "requests": [len(some) for some in times],
            "without_ms": _spread(times[0]),
            "while_moving_ms": _spread(times[1]),
            "ratio": round(beside_move / without, 2),
            "moving_part_of_requests": round(statistics.median(shares), 2),
            "move_ms": _spread(moves),
            "load": [before, _load()],
        }

    def _round(
        self, channel: str, kind: str
    ) -> tuple[list[Request], list[Request], dict[str, Any]]:
        destination = f"destination-{channel}"
        alone = [self._serving.send(kind) for _ in range(3)][1:]
        event_id = self._controller.move(self._source, destination, self._tokens, copy=True)
        beside = []
        while self._controller.ask(f"/events/{event_id}")["state"] == "running":
            beside.append(self._serving.send(kind))
        event = self._controller.ended(event_id)
        self._controller.clear(destination, self._tokens)
        return alone, [request for request in beside if request.begun < event["ended"]], event


def _load() -> list[float]:
    return [round(each, 1) for each in os.getloadavg()]


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        name: round(1e3 * which(seconds), 1)
        for name, which in (("median", statistics.median), ("min", min), ("max", max))
    }


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    size = options.gib * 1.125 + 1
    tokens = range(256 * int(options.gib * (1 << 30) / CHUNK_BYTES))
    with Fleet(folder) as fleet:
        name = "serving"
        keys = settings(
            folder, fleet.controller, name, max_local_cpu_size=size, cache_process="spawn"
        )
        keys["cache_linger_s"] = 1
        keys["transfer_channel"] = "auto"
        for channel in channels():
            fleet.instance(
                f"destination-{channel}", BIG, max_local_cpu_size=size, transfer_channel=channel
            )
        serving = Serving(options, keys)
        until(lambda: fleet.controller.registered(name), "vLLM's cache process registers")
        filler = worker(KitConfig(**keys), BIG)
        moved = store(filler, BIG, tokens)
        try:
            until(
                lambda: (
                    name in fleet.controller.ask("/lookup", {"tokens": list(tokens)})["layout_info"]
                ),
                "the index holds the stored chunks",
            )
            alternation = Alternation(fleet, serving, name, tokens)
            results: dict[str, Any] = {
                "moved_mbytes": round(moved / 1e6),
                "tokens": {"hit": options.hit_tokens, "miss": options.miss_tokens},
                "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
                "cases": [],
            }
            for channel in channels():
                for kind in KINDS:
                    results["cases"].append(alternation.measure(channel, kind, options.rounds))
                    if not options.json:
                        show(results["cases"][-1])
        finally:
            filler.close()
    return results


def show(case: dict[str, Any]) -> None:
    without, moving, moves = case["without_ms"], case["while_moving_ms"], case["move_ms"]
    print(
        f"{case['channel']:5} {case['requests_of']:5} {without['median']:7} ms "
        f"[{without['min']} .. {without['max']}] alone, {moving['median']:7} ms "
        f"[{moving['min']} .. {moving['max']}] while {moves['median']} ms of move: "
        f"{case['ratio']} ({case['requests']} requests, {case['moving_part_of_requests']} of each "
        f"during the move; load {case['load']})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ttft.MODEL)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the moved KV")
    parser.add_argument("--hit-tokens", type=int, default=1500)
    parser.add_argument("--miss-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} is missing: run `make model`")
    os.environ.update(ttft.SETTINGS)
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        results = run(options, Path(folder))
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
