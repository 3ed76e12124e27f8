"""LMCache's controller: one lookup of a long chain that the last instance holds.

Usage: lookup.py INSTANCES KEYS CHUNKS
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time

CHUNK_TOKENS = 256
ROUNDS = 9


async def main(instances: int, keys: int, chunks: int) -> None:
    from lmcache.v1.cache_controller.controllers import KVController, RegistrationController
    from lmcache.v1.cache_controller.message import (
        BatchedKVOperationMsg,
        KVOpEvent,
        LookupMsg,
        OpType,
    )
    from lmcache.v1.token_database import ChunkedTokenDatabase

    rng = random.Random(1)
    tokens = [rng.randrange(100_000) for _ in range(chunks * CHUNK_TOKENS)]
    chain = [key for _, _, key in ChunkedTokenDatabase().process_tokens(tokens, make_key=False)]
    registration = RegistrationController()
    controller = KVController(registry=registration.registry)
    each = keys // instances
    for number in range(instances):
        name = f"instance-{number}"
        registration.registry.register_worker(
            instance_id=name, worker_id=0, ip="127.0.0.1", port=1, peer_init_url=None,
            socket=None, registration_time=time.time(),
        )  # fmt: skip
        held = [rng.getrandbits(62) for _ in range(each)]
        held += chain if number == instances - 1 else []
        for start in range(0, len(held), 1000):
            operations = [
                KVOpEvent(OpType.ADMIT, key, start + offset)
                for offset, key in enumerate(held[start : start + 1000])
            ]
            await controller.handle_batched_kv_operations(
                BatchedKVOperationMsg(
                    instance_id=name,
                    worker_id=0,
                    location="LocalCPUBackend",
                    operations=operations,
                )
            )
    times_s = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        answer = await controller.lookup(LookupMsg(event_id="x", tokens=tokens))
        times_s.append(time.perf_counter() - begin)
    assert answer.layout_info, answer
    print(json.dumps({"lookup_ms": statistics.median(times_s) * 1e3}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:4])))
    os._exit(0)  # LMCache leaves threads running
