"""Moves, stores, evictions, pins and codecs at the same time, in memory that is too small."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcache_kit.keys import pack_tokens

if TYPE_CHECKING:
    from .conftest import Eventually, MakePlace, Place

ROUNDS = 200
CHUNK_BYTES = 16384
STATES = ("done", "partial", "failed")


def test_nothing_wrong_is_ever_read_and_nothing_stays_held(
    make_place: MakePlace, eventually: Eventually
) -> None:
    places = [make_place(name, mib=40 * CHUNK_BYTES / (1 << 20)) for name in ("one", "other")]
    prompts = [range(start, start + 16 * 5 + 3) for start in range(0, 4000, 200)]
    codec = places[0].codecs.get("cachegen")
    faults: list[BaseException] = []
    did: Counter[str] = Counter()

    def worker(seed: int, work: Callable[[random.Random, Place, Place], None]) -> None:
        luck = random.Random(seed)
        try:
            for _ in range(ROUNDS):
                place, another = luck.sample(places, 2)
                work(luck, place, another)
        except BaseException as fault:
            faults.append(fault)

    def store_and_read(luck: random.Random, place: Place, _: Place) -> None:
        prompt = luck.choice(prompts)
        place.store(prompt)
        did["hit"] += place.hit(luck.choice([prompt, *prompts])) > 0

    def move(luck: random.Random, place: Place, another: Place) -> None:
        tokens = luck.choice([None, *prompts])
        outcome = place.move(another, tokens, copy=luck.random() < 0.3)
        assert outcome.state in STATES, outcome
        assert "internal error" not in outcome.message
        assert "Error" not in outcome.message, outcome
        did["moved"] += outcome.progress.chunks_done

    def pin(luck: random.Random, place: Place, _: Place) -> None:
        name = str(luck.randrange(4))
        _, pinned = place.engine.memory_tier.pin(None, pack_tokens(luck.choice(prompts)), name)
        did["pinned"] += pinned.chunks
        place.engine.memory_tier.unpin(None, None, str(luck.randrange(4)))

    def transcode(luck: random.Random, place: Place, _: Place) -> None:
        keys = [key for key, _ in place.engine.memory_tier.keys(None, None)]
        for key in luck.sample(keys, min(3, len(keys))):
            if luck.random() < 0.5:
                did["encoded"] += (
                    place.engine.memory_tier.encode(key, "cachegen", codec).status == "done"
                )
            else:
                did["decoded"] += place.engine.memory_tier.decode(key, "cachegen").status == "done"

    jobs = [store_and_read, move, move, pin, transcode]
    threads = [threading.Thread(target=worker, args=(seed, job)) for seed, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert faults == []
    assert all(did[each] for each in ("hit", "moved", "pinned", "encoded", "decoded")), did
    for place in places:
        eventually(lambda place=place: place.idle)
        stats = place.stats()
        assert stats["corrupt_total"] == 0
        place.engine.memory_tier.unpin(None, None)
        place.engine.memory_tier.clear()
        assert place.stats()["allocated_bytes"] == 0
        assert place.stats()["encoded_chunks"] == 0
