"""Lookup of a long chain in the controller's index, in process, with many keys and instances.

The last of many instances holds the whole chain; every instance holds other keys as well. All keys
arrive in encoded messages that the registry decodes and handles. Printed are medians of a lookup
and of its parts, with all instances, with half of them dead and with fewer of them, the memory of
the index per key, and the keys that it ingests per second. LMCache's registry is measured in the
same run if `make lmcache` has installed LMCache.

    python benchmarks/lookup.py [--keys 1000000] [--instances 1000] [--chunks 128] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

import lmcache_baseline
from msgspec import structs

from lmcache_kit.controller.commands import Commands
from lmcache_kit.controller.instances import Instances, pack
from lmcache_kit.controller.key_index import KeyIndex, Owner
from lmcache_kit.controller.prefix_match import match
from lmcache_kit.controller.registry import Registry
from lmcache_kit.interfaces.frontend import LookupQuery
from lmcache_kit.keys import Namespace, chain
from lmcache_kit.layout import KVLayout
from lmcache_kit.protocol.control import Batch, Register, decode_from_agent, encode

LAYOUT = KVLayout("bfloat16", layers=32, kv_heads=8, head_dim=128)
BATCH_KEYS = 4096
BYTES_PER_PAGE = os.sysconf("SC_PAGE_SIZE")


def median_us(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Return the median duration of a call, over about ``seconds`` and at least nine calls."""
    work()
    spent: list[float] = []
    ends = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < ends or len(spent) < 9:
        work()
        spent.append(time.perf_counter() - begun)
    return round(statistics.median(spent) * 1e6, 1)


def memory_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * BYTES_PER_PAGE


class Fleet:
    """A registry with a number of instances, filled by messages."""

    def __init__(self, namespace: Namespace, instances: int) -> None:
        self.registry = Registry()
        commands = Commands(self.registry.counts, lambda connection, message: None)
        self.instances = Instances(self.registry, commands)
        self.names = [f"instance{number:05}" for number in range(instances)]
        self._seqs = dict.fromkeys(self.names, 0)
        for number, name in enumerate(self.names):
            registration = Register(
                instance_id=name,
                incarnation=number.to_bytes(16, "big"),
                started=1.0,
                host="",
                heartbeat_s=60.0,
                locations=("LocalCPUBackend",),
                workers=(),
                namespaces=(namespace,),
            )
            self.registry.handle(name, registration)

    def put(self, name: str, blob: bytes) -> None:
        for start in range(0, len(blob), BATCH_KEYS * 16):
            self._seqs[name] += 1
            batch = Batch(
                "LocalCPUBackend", self._seqs[name], blob[start : start + BATCH_KEYS * 16], b""
            )
            self.registry.handle(name, decode_from_agent(encode(batch)))

    def die(self, names: list[str]) -> None:
        """Hide instances from lookups, as the registry does when heartbeats stop."""
        for name in names:
            for replica in self.registry.find(name).replicas.values():
                self.registry.index.hide(replica.holder)


def measure_fill(keys: int, instances: int) -> tuple[Fleet, Namespace, dict[str, float]]:
    """Measure ingest and memory with random keys, spread evenly over the instances."""
    namespace = Namespace("some/model", LAYOUT, chunk_size=256)
    fleet = Fleet(namespace, instances)
    share = keys // instances
    blobs = [random.randbytes(16 * share) for _ in fleet.names]
    before = memory_bytes()
    begun = time.perf_counter()
    for name, blob in zip(fleet.names, blobs, strict=True):
        fleet.put(name, blob)
    spent = time.perf_counter() - begun
    figures = {
        "keys": len(fleet.registry.index),
        "index_bytes_per_key": round((memory_bytes() - before) / (share * instances), 1),
        "ingest_keys_per_s": round(share * instances / spent),
    }
    return fleet, namespace, figures


def measure_lookup(fleet: Fleet, chunk_size: int, chunks: int) -> dict[str, Any]:
    """Add a chain to the last instance; measure its lookup and the parts of it."""
    namespace = Namespace(f"model{chunk_size}", LAYOUT, chunk_size)
    last = fleet.names[-1]
    registration = fleet.registry.find(last).registration
    fleet.registry.handle(last, structs.replace(registration, namespaces=(namespace,)))
    tokens = [random.randrange(128_000) for _ in range(chunk_size * chunks)]
    packed = pack(tokens)
    keys = [chunk.key for chunk in chain(namespace.digest, packed, chunk_size)]
    fleet.put(last, b"".join(keys))
    index, digest = fleet.registry.index, namespace.digest
    plain = LookupQuery(tokens, model=namespace.model)
    quick = LookupQuery(array("I", tokens), model=namespace.model)
    (found,) = fleet.instances.lookup(plain).instances
    assert (found.instance_id, found.best.tokens) == (last, len(tokens))
    return {
        "chunk_tokens": chunk_size,
        "tokens": len(tokens),
        "lookup_us": median_us(lambda: fleet.instances.lookup(plain)),
        "lookup_of_array_us": median_us(lambda: fleet.instances.lookup(quick)),
        "pack_list_us": median_us(lambda: pack(tokens)),
        "match_us": median_us(lambda: match(index, digest, packed, chunk_size, -1)),
        "hash_us": median_us(lambda: [None for _ in chain(digest, packed, chunk_size)]),
        "index_only_us": median_us(lambda: [index.held(key) for key in keys]),
    }


def measure_sweep(keys: int) -> dict[str, float]:
    """Measure how long the removal of a holder of many keys takes, and its longest step."""
    index = KeyIndex()
    holder = index.open(Owner("a", "LocalCPUBackend"))
    blob = random.randbytes(16 * keys)
    index.add(holder, [blob[at : at + 16] for at in range(0, len(blob), 16)])
    index.show(holder)
    begun = time.perf_counter()
    index.close(holder)
    closed = time.perf_counter() - begun
    steps = []
    while True:
        begun = time.perf_counter()
        more = index.sweep()
        steps.append(time.perf_counter() - begun)
        if not more:
            break
    return {
        "close_us": round(closed * 1e6, 1),
        "sweep_ms": round(sum(steps) * 1e3, 1),
        "longest_step_ms": round(max(steps) * 1e3, 2),
    }


def measure_cold(keys: int, instances: int, chunks: int) -> dict[str, Any]:
    """Measure one lookup in a new registry."""
    fleet, _, _ = measure_fill(keys, instances)
    return {"instances": instances, **measure_lookup(fleet, 256, chunks)}


def run(keys: int, instances: int, chunks: int) -> dict[str, Any]:
    random.seed(1)
    fleet, _, filled = measure_fill(keys, instances)
    results: dict[str, Any] = {"instances": instances, "chunks": chunks, **filled}
    results["lookups"] = [measure_lookup(fleet, size, chunks) for size in (16, 256)]
    fleet.die(fleet.names[: instances // 2])
    results["half_of_the_instances_dead"] = [
        measure_lookup(fleet, size, chunks) for size in (16, 256)
    ]
    del fleet
    counts = (1, max(1, instances // 100), max(1, instances // 10))
    results["fewer_instances"] = [measure_cold(keys, count, chunks) for count in counts]
    results["removal_of_a_holder_of_all_keys"] = measure_sweep(keys)
    return results


def show(results: dict[str, Any]) -> None:
    for name, value in results.items():
        rows = value if isinstance(value, list) else [value]
        for row in rows:
            if isinstance(row, dict):
                print(f"{name}: " + "  ".join(f"{key}={each}" for key, each in row.items()))
            else:
                print(f"{name}: {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=128, help="length of the chain")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = run(options.keys, options.instances, options.chunks)
    if not options.json:
        show(results)
    lmcache = lmcache_baseline.measure("lookup", options.instances, options.keys, options.chunks)
    if lmcache and not options.json:
        show({"lmcache": lmcache})
    if options.json:
        json.dump({**results, "lmcache": lmcache}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
