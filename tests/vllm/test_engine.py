"""The connector in a real engine: the same text as without it, and less to compute.

Everything is float32 and greedy, so texts are compared token by token with an engine that has no
connector. vLLM's own prefix cache is on and emptied before each request that should load.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.waiting import eventually
from tests.vllm.conftest import BLOCK, CHUNK, Engine, Reference, prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def test_a_second_request_loads_all_but_the_last_token(
    engine: Engine, reference: Reference
) -> None:
    tokens = prompt(200, seed=1)
    cold, warm = engine.one(tokens), engine.one(tokens)
    assert (cold.cached, warm.cached) == (0, 199)
    assert cold.tokens == warm.tokens == reference(tokens)


@pytest.mark.parametrize(
    "length", [1, 2, BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * BLOCK, 4 * CHUNK, 161]
)
def test_prompts_around_the_boundaries_of_chunks_and_blocks(
    engine: Engine, reference: Reference, length: int
) -> None:
    tokens = prompt(length, seed=1000 + length)
    assert engine.one(tokens).cached == 0
    warm = engine.one(tokens)
    assert warm.cached == length - 1
    assert warm.tokens == reference(tokens)


@pytest.mark.parametrize("shared", [1, 30, CHUNK, CHUNK + 7, 150])
def test_a_prompt_that_goes_on_differently_loads_the_common_tokens(
    engine: Engine, reference: Reference, shared: int
) -> None:
    first = prompt(200, seed=2)
    engine.one(first)
    other = first[:shared] + prompt(60, seed=3000 + shared)
    reply = engine.one(other)
    assert reply.cached == shared
    assert reply.tokens == reference(other)


def test_a_prompt_that_continues_a_stored_tail_loads_all_of_it(
    engine: Engine, reference: Reference
) -> None:
    tokens = prompt(170, seed=4)
    engine.one(tokens[:70])
    reply = engine.one(tokens)
    assert reply.cached == 70
    assert reply.tokens == reference(tokens)


def test_vllm_s_own_prefix_cache_and_ours_add_up(engine: Engine, reference: Reference) -> None:
    tokens = prompt(200, seed=5)
    engine.one(tokens)
    engine.one(tokens[:100])  # three blocks of it are in vLLM's own cache now
    reply = engine.one(tokens, forget=False)
    assert reply.cached == 199
    assert reply.tokens == reference(tokens)


def test_vllm_s_own_prefix_cache_alone_serves_what_it_has(
    engine: Engine, reference: Reference
) -> None:
    tokens = prompt(3 * BLOCK + 1, seed=6)
    engine.one(tokens)
    loaded = engine.worker.counts["loaded_tokens"]
    reply = engine.one(tokens, forget=False)
    assert reply.cached == 3 * BLOCK
    assert engine.worker.counts["loaded_tokens"] == loaded
    assert reply.tokens == reference(tokens)


def test_what_only_vllm_had_is_saved_too(engine: Engine, reference: Reference) -> None:
    tokens = prompt(150, seed=7)
    engine.one(tokens, extra_args={"kv_transfer_params": {"lmcache.skip_save": True}})
    assert engine.one(tokens, forget=False).cached == 4 * BLOCK
    reply = engine.one(tokens)
    assert reply.cached == 149
    assert reply.tokens == reference(tokens)


def test_requests_of_one_batch_each_get_their_own(engine: Engine, reference: Reference) -> None:
    stored = [prompt(60, seed=seed) for seed in (10, 11)]
    engine.generate(*stored)
    batch = [stored[1], prompt(60, seed=12), stored[0] + prompt(20, seed=13), stored[0][:33]]
    replies = engine.generate(*batch)
    assert [reply.cached for reply in replies] == [59, 0, 60, 32]
    assert [reply.tokens for reply in replies] == [reference(tokens) for tokens in batch]


def test_equal_requests_of_one_batch_store_once(engine: Engine, reference: Reference) -> None:
    tokens = prompt(CHUNK, seed=14)
    before = engine.stats()["stored_chunks_total"]
    replies = engine.generate(tokens, tokens, tokens)
    assert engine.stats()["stored_chunks_total"] == before + 1
    assert all(reply.tokens == reference(tokens) for reply in replies)


def test_preempted_requests_resume_with_the_right_text(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted = []
    scheduler = engine.core.scheduler
    preempt = scheduler._preempt_request

    def preempt_and_forget(request: Any, *args: Any, **more: Any) -> None:
        """So that what the request had computed must come from the kit."""
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        preempted.append(request.request_id)
        preempt(request, *args, **more)
        scheduler.kv_cache_manager.evict_blocks(set(blocks))

    monkeypatch.setattr(scheduler, "_preempt_request", preempt_and_forget)
    batch = [prompt(260, seed=15), prompt(270, seed=16)]
    lookups = engine.scheduler.counts["lookups"]
    loaded = engine.worker.counts["loaded_tokens"]
    replies = engine.generate(*batch, max_tokens=36)
    assert len(preempted) >= 1
    assert [reply.tokens for reply in replies] == [reference(tokens, 36) for tokens in batch]
    # One question per placement, however often vLLM asked while it waited.
    assert engine.scheduler.counts["lookups"] - lookups == len(batch) + len(preempted)
    assert engine.worker.counts["loaded_tokens"] - loaded >= 260 * len(preempted)


def test_a_salt_keeps_requests_apart(engine: Engine, reference: Reference) -> None:
    tokens = prompt(90, seed=17)
    engine.one({"prompt_token_ids": tokens, "cache_salt": "one"})
    assert engine.one(tokens).cached == 0
    assert engine.one({"prompt_token_ids": tokens, "cache_salt": "two"}).cached == 0
    reply = engine.one({"prompt_token_ids": tokens, "cache_salt": "one"})
    assert reply.cached == 89
    assert reply.tokens == reference(tokens)


def test_tags_keep_requests_apart(engine: Engine) -> None:
    tokens = prompt(90, seed=18)

    def tagged(value: str) -> int:
        wishes = {"lmcache.tag.tenant": value}
        return engine.one(tokens, extra_args={"kv_transfer_params": wishes}).cached  # type: ignore[no-any-return]

    assert [tagged("a"), tagged("b"), tagged("a"), tagged("b")] == [0, 0, 89, 89]
    assert engine.one(tokens).cached == 0


def test_skip_save_stores_nothing(engine: Engine) -> None:
    tokens = prompt(90, seed=19)
    for _ in range(2):
        wishes = {"kv_transfer_params": {"lmcache.skip_save": True}}
        assert engine.one(tokens, extra_args=wishes).cached == 0


@pytest.fixture
def saving_decodes(engine: Engine) -> Iterator[Engine]:
    policy = engine.scheduler.policy
    saving = dataclasses.replace(policy.saving, decode=True)
    engine.scheduler.policy = dataclasses.replace(policy, saving=saving)
    yield engine
    engine.scheduler.policy = policy


def test_generated_tokens_are_not_saved_by_default(engine: Engine) -> None:
    tokens = prompt(CHUNK - 8, seed=20)
    answer = engine.one(tokens, max_tokens=20).tokens
    assert engine.one([*tokens, *answer, 7]).cached == CHUNK - 8


def test_generated_tokens_are_saved_when_asked_for(
    saving_decodes: Engine, reference: Reference
) -> None:
    tokens = prompt(CHUNK - 8, seed=21)
    answer = saving_decodes.one(tokens, max_tokens=20).tokens
    longer = [*tokens, *answer, 7]
    reply = saving_decodes.one(longer)
    # The last sampled token was never computed, so there is no KV of it.
    assert reply.cached == len(tokens) + len(answer) - 1
    assert reply.tokens == reference(longer)


def test_an_aborted_request_leaves_nothing_behind(engine: Engine, reference: Reference) -> None:
    from vllm import SamplingParams

    tokens = prompt(300, seed=22)
    core = engine.llm.llm_engine
    core.add_request("gone", {"prompt_token_ids": tokens}, SamplingParams(max_tokens=50))
    core.step()  # 128 of its 300 tokens
    core.abort_request(["gone"])
    engine.settle()
    reply = engine.one(tokens)
    assert reply.cached == 128 // CHUNK * CHUNK
    assert reply.tokens == reference(tokens)


def test_corrupt_memory_is_computed_again_and_replaced(
    engine: Engine, reference: Reference
) -> None:
    tokens = prompt(200, seed=23)
    engine.one(tokens)
    corrupt = engine.stats()["corrupt_total"]
    memory = engine.worker_client.memory(engine.worker_client.incarnation)
    for at in range(0, len(memory), 4096):
        memory[at] ^= 0xFF
    assert engine.one(tokens).tokens == reference(tokens)
    assert engine.stats()["corrupt_total"] == corrupt + -(-200 // CHUNK)
    again = engine.one(tokens)
    assert again.tokens == reference(tokens)
    assert again.cached == 199
    assert engine.stats()["corrupt_total"] == corrupt + -(-200 // CHUNK)


def test_requests_that_share_a_failed_load_store_no_garbage(
    engine: Engine, reference: Reference
) -> None:
    tokens = prompt(96, seed=24)
    engine.one(tokens)
    memory = engine.worker_client.memory(engine.worker_client.incarnation)
    for at in range(0, len(memory), 4096):
        memory[at] ^= 0xFF
    batch = [tokens + prompt(10, seed=seed) for seed in (25, 26)]
    replies = engine.generate(*batch)
    assert [reply.tokens for reply in replies] == [reference(tokens) for tokens in batch]
    for tokens in batch:
        for _ in range(4):
            assert engine.one(tokens).tokens == reference(tokens)


def test_without_the_cache_process_vllm_goes_on_and_later_caches_again(
    engine: Engine, reference: Reference
) -> None:
    tokens = prompt(200, seed=27)
    engine.one(tokens)
    client = engine.worker_client
    incarnation = client.incarnation
    os.kill(client.stats().pid, signal.SIGKILL)
    reply = engine.one(tokens)
    assert reply.tokens == reference(tokens)
    eventually(lambda: client.connected and client.incarnation != incarnation)
    eventually(lambda: engine.scheduler_client.connected)
    assert engine.one(tokens).tokens == reference(tokens)
    warm = engine.one(tokens)
    assert warm.cached == 199
    assert warm.tokens == reference(tokens)


def test_the_cache_process_dies_between_a_lookup_and_its_load(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(200, seed=28)
    engine.one(tokens)
    client = engine.worker_client
    load, pid = engine.worker.start_load_kv, client.stats().pid

    def dies_first(step: object) -> None:
        if step.loads:  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not client.connected)
            monkeypatch.setattr(client, "memory", lambda incarnation: None)
        load(step)

    monkeypatch.setattr(engine.worker, "start_load_kv", dies_first)
    assert engine.one(tokens).tokens == reference(tokens)
    monkeypatch.undo()
    eventually(lambda: client.connected)
    assert engine.one(tokens).tokens == reference(tokens)
