"""Moves of KV between two cache processes on one host, beside memcpy, NIXL alone and bare sockets.

Three parts, which may be chosen by name:

``bytes``: a source and a destination process, which read 8 x 32 MiB (chunks of 256 tokens of an 8B
Llama), 32 x 5.6 MiB (SmolLM2-135M) and 270 KiB (12 tokens of it). ``link`` is the transport alone;
``nixl+xxh3`` adds a second thread that hashes each region as soon as it has arrived, as a verifying
reader must. ``move`` is a whole move over an open link: handshake, lease, read, verification of
every byte, commit, release of the lease. The baselines are memcpy, one NIXL READ of one list of
descriptors (``raw nixl``), and sendall and recv_into over one connection (``sockets``). Each round
measures every way once, in random order, into memory that was touched before. A ratio is of
medians; its range is that of the rounds' own ratios.

``small``: 12 tokens through real programs: a controller, reached by REST, and two cache processes.
The times are those of the operation: from its creation, or from its start at the destination, to
its end. ``copy`` leaves the source as it is. ``copy at once`` is the same shortly after another
change at the destination. ``move`` waits for the controller's index and deletes at the source.

``idle``: the share of a core that idle cache processes use after those moves.

    python benchmarks/move.py [PART ...] [--rounds 25] [--seconds 10] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet import SMOLLM2, Fleet, Instance, cpu_s, store, until
from two_caches import PAYLOADS, Destination, channels

from lmcache_kit.keys import Namespace

PARTS = ("bytes", "small", "idle")
NAMESPACE = Namespace("bench/smollm2", SMOLLM2, 256)
TOKENS = range(12)
BASELINES = {"nixl": "raw nixl", "tcp": "sockets"}
KINDS = ("copy", "copy at once", "move")
CALM_S = 0.05
"""After this pause all changes have reached the controller."""
SMALL_ROUNDS = 8
"""Factor on the number of rounds for the smallest payload."""


def load() -> list[float]:
    return [round(each, 1) for each in os.getloadavg()]


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


# bytes


def measure_bytes(
    destination: Destination, number: int, rounds: int, chosen: random.Random
) -> dict[str, Any]:
    """Measure every way for one payload."""
    payload = PAYLOADS[number]
    total = sum(payload.sizes)
    ways = destination.ways(number)
    before = load()
    for _ in range(2):
        for way in ways.values():
            way()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in chosen.sample(list(ways), len(ways)):
            spent[name].append(ways[name]())
    result: dict[str, Any] = {
        "payload": payload.name,
        "mbytes": round(total / 1e6, 2),
        "rounds": rounds,
        "load": [before, load()],
        "ways": {
            name: {
                "ms": spread([each * 1e3 for each in times], 3),
                "gb_s": round(total / 1e9 / statistics.median(times), 2),
            }
            for name, times in spent.items()
        },
    }
    for channel, baseline in BASELINES.items():
        for name in (f"{channel} link", f"{channel}+xxh3", f"{channel} move"):
            if name in spent and baseline in spent:
                result["ways"][name]["of_baseline"] = ratio_to(
                    baseline, spent[baseline], spent[name]
                )
    return result


def ratio_to(baseline: str, bare: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return the speed as a share of the baseline's."""
    pairs = sorted(a / b for a, b in zip(bare, ours, strict=True))
    return {
        "baseline": baseline,
        "ratio": round(statistics.median(bare) / statistics.median(ours), 2),
        "quartiles": [round(each, 2) for each in statistics.quantiles(pairs)[::2]],
        "range": [round(pairs[0], 2), round(pairs[-1], 2)],
    }


def show_bytes(result: dict[str, Any]) -> None:
    print(f"\n{result['payload']}, {result['rounds']} rounds, load {result['load']}")
    for name, way in result["ways"].items():
        line = "  {:10} {median:9.3f} ms [{min:.3f} .. {max:.3f}]".format(name, **way["ms"])
        line += f"  {way['gb_s']:6.2f} GB/s"
        if ratio := way.get("of_baseline"):
            line += (
                f"  {ratio['ratio']:.2f} of {ratio['baseline']}, quartiles {ratio['quartiles']}, "
                f"range {ratio['range']}"
            )
        print(line, flush=True)


# small


def measure_small(
    fleet: Fleet, channel: str, pair: tuple[Instance, Instance], rounds: int
) -> dict[str, Any]:
    """Copy 12 tokens from one instance to the other; move them there and back."""
    controller = fleet.controller
    source, destination = pair
    store(source.client, NAMESPACE, TOKENS)
    until(lambda: _is_indexed(fleet, source), "the index holds the stored chunks")
    before = load()
    result: dict[str, Any] = {"channel": channel, "rounds": rounds}
    get_event: list[float] = []
    for kind in KINDS:
        created, started, reading, posted = [], [], [], []
        for number in range(rounds + 2):
            if kind != "copy at once":
                time.sleep(CALM_S)
            begun = time.perf_counter()
            event_id = controller.move(source.name, destination.name, TOKENS, copy=kind != "move")
            spent = time.perf_counter() - begun
            event = controller.ended(event_id)
            transfer = event["progress"][0]["transfer"]
            assert transfer["transport"] == channel, transfer
            if number >= 2:
                posted.append(spent * 1e3)
                created.append((event["ended"] - event["created"]) * 1e3)
                started.append((event["ended"] - event["started"]) * 1e3)
                reading.append(transfer["seconds"] * 1e3)
            if kind != "move":
                controller.clear(destination.name, TOKENS)
            else:
                source, destination = destination, source
            begun = time.perf_counter()
            controller.ask(f"/events/{event_id}")
            get_event.append((time.perf_counter() - begun) * 1e3)
        result[kind] = {
            "created_to_ended_ms": spread(created),
            "started_to_ended_ms": spread(started),
            "transfer_ms": spread(reading, 3),
            "post_ms": spread(posted),
        }
    result["get_event_ms"] = spread(get_event)
    result["load"] = [before, load()]
    return result


def _is_indexed(fleet: Fleet, instance: Instance) -> bool:
    held = fleet.controller.ask("/lookup", {"tokens": list(TOKENS)})["layout_info"]
    return instance.name in held


def show_small(result: dict[str, Any]) -> None:
    print(f"\n12 tokens by {result['channel']}, {result['rounds']} rounds, load {result['load']}")
    for kind in KINDS:
        for name, figures in result[kind].items():
            print(f"  {kind:12} {name:22} " + "{median:8.3f} [{min} .. {max}]".format(**figures))
    print(
        "  {:27} {median:8.3f} [{min} .. {max}]".format("GET /events/ID", **result["get_event_ms"])
    )


# idle


def measure_idle(instances: Sequence[Instance], seconds: float) -> dict[str, Any]:
    """Return the share of a core by process, in percent."""
    before = [cpu_s(instance.pid) for instance in instances]
    begun = time.perf_counter()
    time.sleep(seconds)
    spent = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "load": load(),
        "percent_of_a_core": {
            instance.name: round((cpu_s(instance.pid) - was) / spent * 100, 2)
            for instance, was in zip(instances, before, strict=True)
        },
    }


def show_idle(result: dict[str, Any]) -> None:
    print(f"\nidle for {result['seconds']:g} s, load {result['load']}: percent of a core")
    for name, percent in result["percent_of_a_core"].items():
        print(f"  {name:10} {percent:6.2f}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    show = not options.json
    if "bytes" in options.parts:
        destination = Destination()
        results["bytes"] = []
        try:
            for number, payload in enumerate(PAYLOADS):
                rounds = options.rounds * (1 if len(payload.sizes) > 1 else SMALL_ROUNDS)
                results["bytes"].append(
                    measure_bytes(destination, number, rounds, random.Random(number))
                )
                if show:
                    show_bytes(results["bytes"][-1])
        finally:
            destination.close()
    if not {"small", "idle"} & set(options.parts):
        return results
    with tempfile.TemporaryDirectory(prefix="lk-") as folder, Fleet(Path(folder)) as fleet:
        pairs = {
            name: (
                fleet.instance(f"{name}-a", NAMESPACE, transfer_channel=name),
                fleet.instance(f"{name}-b", NAMESPACE, transfer_channel=name),
            )
            for name in channels()
        }
        results["small"] = []
        for name, pair in pairs.items():
            rounds = options.rounds * 2 if "small" in options.parts else 1
            results["small"].append(measure_small(fleet, name, pair, rounds))
            if show and "small" in options.parts:
                show_small(results["small"][-1])
        if "idle" in options.parts:
            bare = fleet.instance("no moves", NAMESPACE, enable_p2p=False)
            time.sleep(1)
            instances = [*(each for pair in pairs.values() for each in pair), bare]
            results["idle"] = measure_idle(instances, options.seconds)
            if show:
                show_idle(results["idle"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="bytes, small or idle (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of part idle")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    results = run(options)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
