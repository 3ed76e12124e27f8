"""Decisions of the connector's scheduler role, without an engine."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_kit.keys import pack_tokens
from tests.vllm.fakes import (
    BLOCK,
    CHUNK,
    NAMESPACE,
    FakeClient,
    generated,
    new_request,
    scheduled,
)

PROMPT = list(range(100, 120))  # two chunks and a half
BLOCKS = list(range(10, 60))


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def new_side(client: FakeClient, clock: Any = lambda: 0.0, **policy: Any) -> Any:
    from lmcache_kit.vllm.request_tracker import SavePolicy
    from lmcache_kit.vllm.scheduler import ConnectorScheduler, SchedulerPolicy

    saving = SavePolicy(CHUNK, policy.pop("decode", False), policy.pop("unfull", True))
    return ConnectorScheduler(
        client, NAMESPACE, SchedulerPolicy(saving, **policy), block_tokens=BLOCK, clock=clock
    )


def report(failures: int, passive: str = "", failed: Iterable[str] = ()) -> Any:
    from lmcache_kit.vllm.metadata import WorkerMetadata

    meta = WorkerMetadata(failures, passive, frozenset(failed))
    return SimpleNamespace(kv_connector_worker_meta=meta)


def place(side: Any, request: Any, computed: int = 0) -> int:
    """What vLLM does with a request that it can place; returns the tokens to load."""
    external = side.get_num_new_matched_tokens(request, computed)
    side.update_state_after_alloc(request, BLOCKS, external)
    request.num_computed_tokens = computed + external
    return int(external)


def run(side: Any, request: Any, count: int | None = None) -> Any:
    """Schedule ``count`` more tokens of the request, or all that are left."""
    count = count or request.num_tokens - request.num_computed_tokens
    step = side.build_connector_meta(scheduled(**{request.request_id: count}))
    request.num_computed_tokens += count
    return step


def spans(saves: list[Any]) -> list[tuple[int, int]]:
    return [(save.start, save.end) for save in saves]


# Loads.


def test_all_but_the_last_token_can_be_loaded(client: FakeClient) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    assert place(side, request) == len(PROMPT) - 1
    (load,) = run(side, request).loads
    assert (load.start, load.end, load.incarnation) == (0, len(PROMPT) - 1, "life-1")
    assert load.blocks == [10, 11, 12, 13, 14]
    assert client.held() == 1  # the worker's to release


def test_what_vllm_holds_itself_is_not_loaded(client: FakeClient) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    assert place(side, request, computed=BLOCK) == len(PROMPT) - 1 - BLOCK
    (load,) = run(side, request).loads
    assert (load.start, load.end) == (BLOCK, len(PROMPT) - 1)


def test_the_cache_is_asked_once_however_often_vllm_asks(client: FakeClient) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    answers = {side.get_num_new_matched_tokens(request, 0) for _ in range(140)}
    assert answers == {len(PROMPT) - 1}
    assert client.calls == ["lookup", "poll"]


def test_a_miss_is_remembered_too(client: FakeClient) -> None:
    side, request = new_side(client), new_request(PROMPT)
    assert [side.get_num_new_matched_tokens(request, 0) for _ in range(3)] == [0, 0, 0]
    assert client.calls == ["lookup", "poll"]


def test_a_request_that_waits_long_is_looked_up_again_before_its_lease_ends(
    client: FakeClient,
) -> None:
    now = [0.0]
    client.store(PROMPT)
    side, request = new_side(client, lambda: now[0], lookup_age_s=60), new_request(PROMPT)
    side.get_num_new_matched_tokens(request, 0)
    now[0] = 61.0
    side.get_num_new_matched_tokens(request, 0)
    assert client.calls == ["lookup", "poll", "release", "lookup", "poll"]
    assert client.held() == 1


def test_a_lookup_that_takes_time_holds_up_nobody(client: FakeClient) -> None:
    client.store(PROMPT)
    client.slow = True
    side, request = new_side(client), new_request(PROMPT)
    assert [side.get_num_new_matched_tokens(request, 0) for _ in range(3)] == [None, None, None]
    client.slow = False
    assert place(side, request) == len(PROMPT) - 1
    assert client.calls.count("lookup") == 1
    assert side.stats()["lookups_waited_for"] == 1


def test_a_request_aborted_before_the_answer_comes_gives_back_what_it_grants(
    client: FakeClient,
) -> None:
    client.store(PROMPT)
    client.slow = True
    side, request = new_side(client), new_request(PROMPT)
    assert side.get_num_new_matched_tokens(request, 0) is None
    assert side.request_finished(request, []) is False
    assert client.held() == 0


@pytest.mark.parametrize("step", ["lookup", "poll"])
def test_a_late_lookup_is_a_miss(client: FakeClient, step: str) -> None:
    client.fails = {step}
    side, request = new_side(client), new_request(PROMPT)
    assert place(side, request) == 0
    assert run(side, request).loads == []


def test_a_match_shorter_than_worth_loading_is_given_back(client: FakeClient) -> None:
    client.store(PROMPT[:CHUNK])
    side, request = new_side(client, min_load_tokens=CHUNK + 1), new_request(PROMPT)
    assert place(side, request) == 0
    assert client.held() == 0


def test_a_match_that_vllm_does_not_want_is_given_back(client: FakeClient) -> None:
    client.store(PROMPT[:CHUNK])
    side, request = new_side(client), new_request(PROMPT)
    assert place(side, request, computed=2 * CHUNK) == 0
    assert client.held() == 0


def test_a_request_aborted_while_it_waits_gives_its_lease_back(client: FakeClient) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    side.get_num_new_matched_tokens(request, 0)
    assert side.request_finished(request, []) is False
    assert client.held() == 0


def test_an_asynchronous_load_begins_in_a_step_that_computes_none_of_its_tokens(
    client: FakeClient,
) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    (load,) = side.build_connector_meta(scheduled()).loads
    assert (load.request_id, load.blocks) == ("r", [10, 11, 12, 13, 14])
    assert side.build_connector_meta(scheduled()).loads == []


def test_a_load_whose_request_is_aborted_before_the_step_is_given_back(client: FakeClient) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    assert side.request_finished(request, []) is False
    assert side.build_connector_meta(scheduled()).loads == []
    assert client.held() == 0


def test_a_request_whose_load_failed_is_computed_whatever_the_cache_says(
    client: FakeClient,
) -> None:
    client.store(PROMPT)
    side, request, other = new_side(client), new_request(PROMPT), new_request(PROMPT, "other")
    place(side, request)
    run(side, request, 1)
    side.update_connector_output(report(1, failed={"r"}))
    request.num_computed_tokens = 0
    assert place(side, request) == 0
    assert place(side, other) == len(PROMPT) - 1


def test_a_preempted_request_is_looked_up_again_with_what_it_generated(
    client: FakeClient,
) -> None:
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    run(side, request)
    generated(request, 1, 2)
    client.store(PROMPT[: 2 * CHUNK])
    assert place(side, request) == 2 * CHUNK
    assert run(side, request).loads[0].end == 2 * CHUNK
    assert side.counts["lookups"] == 2


def test_a_consumer_that_may_not_load_does_not_ask(client: FakeClient) -> None:
    side = new_side(client, load=False)
    assert place(side, new_request(PROMPT)) == 0
    assert client.calls == []


def test_a_request_that_wants_no_cached_prefix_does_not_ask(client: FakeClient) -> None:
    side = new_side(client)
    assert place(side, new_request(PROMPT, skip_reading_prefix_cache=True)) == 0
    assert client.calls == []


@pytest.mark.parametrize(
    "peculiarity",
    [
        {"mm_features": [object()]},
        {"prompt_embeds": object()},
        {"prompt_token_ids": None},
        {"pooling_params": object()},
        {"resumable": True},
        {"prompt_token_ids": [5, -1], "all_token_ids": [5, -1]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_requests_whose_tokens_do_not_name_their_kv_bypass_the_cache(
    client: FakeClient, peculiarity: dict[str, Any]
) -> None:
    side, request = new_side(client), new_request(PROMPT, **peculiarity)
    assert place(side, request) == 0
    step = run(side, request)
    assert (step.loads, step.saves, client.calls) == ([], [], [])
    assert side.request_finished(request, []) is False


# Another generation.


def test_after_a_reset_nothing_of_before_is_found_and_all_is_saved_anew(
    client: FakeClient,
) -> None:
    client.store(PROMPT)
    side = new_side(client)
    side.reset_cache()
    (namespace,) = client.namespaces
    assert namespace.generation
    assert namespace.digest != NAMESPACE.digest
    assert place(side, request := new_request(PROMPT)) == 0
    assert {save.namespace for save in run(side, request).saves} == {namespace.digest}
    side.reset_cache()
    assert client.namespaces[1].digest not in (NAMESPACE.digest, namespace.digest)


def test_a_request_under_way_at_a_reset_neither_loads_nor_saves_any_more(
    client: FakeClient,
) -> None:
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    run(side, request, 5)
    side.reset_cache()
    assert run(side, request).saves == []
    assert place(side, request) == 0
    assert side.request_finished(request, []) is False


def test_a_request_that_waits_at_a_reset_is_looked_up_in_the_new_generation(
    client: FakeClient,
) -> None:
    client.store(PROMPT)
    side, found, asked = new_side(client), new_request(PROMPT), new_request(PROMPT, "slow")
    side.get_num_new_matched_tokens(found, 0)
    client.slow = True
    side.get_num_new_matched_tokens(asked, 0)
    client.slow = False
    side.reset_cache()
    assert client.held() == 0
    assert [place(side, request) for request in (found, asked)] == [0, 0]


# Saves.


def test_a_prompt_is_saved_in_chunks_with_its_tail(client: FakeClient) -> None:
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    saves = run(side, request).saves
    assert spans(saves) == [(0, 8), (8, 16), (16, 20)]
    assert [save.tokens for save in saves] == [
        pack_tokens(PROMPT[start:end]) for start, end in spans(saves)
    ]
    assert saves[-1].blocks == [10, 11, 12, 13, 14]


def test_the_keys_of_a_chain_follow_each_other(client: FakeClient) -> None:
    from lmcache_kit.keys import chain

    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    saves = run(side, request).saves
    wanted = chain(NAMESPACE.digest, pack_tokens(PROMPT), CHUNK)
    assert [save.parent for save in saves] == [chunk.parent for chunk in wanted]


def test_a_tail_is_not_saved_when_only_full_chunks_are_wanted(client: FakeClient) -> None:
    side, request = new_side(client, unfull=False), new_request(PROMPT)
    place(side, request)
    assert spans(run(side, request).saves) == [(0, 8), (8, 16)]


def test_a_prompt_prefilled_in_pieces_is_saved_as_its_chunks_fill_up(client: FakeClient) -> None:
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    assert [spans(run(side, request, count).saves) for count in (5, 5, 9, 1)] == [
        [],
        [(0, 8)],
        [(8, 16)],
        [(16, 20)],
    ]


def test_what_a_lookup_found_is_not_saved_again(client: FakeClient) -> None:
    client.store(PROMPT[:CHUNK])
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    assert spans(run(side, request).saves) == [(8, 16), (16, 20)]


def test_a_prompt_found_with_its_tail_is_not_saved_again(client: FakeClient) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    assert run(side, request).saves == []


def test_generated_tokens_are_not_saved_by_default(client: FakeClient) -> None:
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    run(side, request)
    for token in range(10):
        generated(request, token)
        assert run(side, request).saves == []
    assert side.request_finished(request, list(range(10, 20))) is False


def test_generated_tokens_are_saved_as_chunks_fill_up_and_at_the_end(client: FakeClient) -> None:
    side, request = new_side(client, decode=True), new_request(PROMPT)
    place(side, request)
    run(side, request)
    saved = []
    for token in range(7):
        generated(request, token)
        saved += spans(run(side, request).saves)
    assert saved == [(16, 24)]
    generated(request, 7)  # sampled, and its KV is never computed
    assert side.request_finished(request, list(range(10, 20))) is True
    step = side.build_connector_meta(scheduled())
    assert spans(step.saves) == [(24, 27)]
    assert step.free_after_save == {"r"}


def test_a_request_that_ends_within_its_prompt_keeps_no_blocks(client: FakeClient) -> None:
    side, request = new_side(client, decode=True), new_request(PROMPT)
    place(side, request)
    run(side, request, 10)
    assert side.request_finished(request, [10, 11, 12]) is False


def test_tokens_still_in_flight_are_not_saved_at_the_end(client: FakeClient) -> None:
    side, request = new_side(client, decode=True), new_request(PROMPT)
    place(side, request)
    run(side, request)
    generated(request, 1, 2, 3)
    request.num_computed_tokens, request.num_in_flight_tokens = 23, 2
    assert side.request_finished(request, list(range(10, 20))) is True
    assert spans(side.build_connector_meta(scheduled()).saves) == [(16, 21)]


def test_tokens_scheduled_before_they_are_known_are_not_saved(client: FakeClient) -> None:
    side, request = new_side(client, decode=True), new_request(PROMPT)
    place(side, request)
    run(side, request)
    assert run(side, request, 4).saves == []  # placeholders and drafts


def test_skip_save_saves_nothing_and_still_loads(client: FakeClient) -> None:
    client.store(PROMPT[:CHUNK])
    request = new_request(PROMPT, kv_transfer_params={"lmcache.skip_save": True})
    side = new_side(client, decode=True)
    assert place(side, request) == CHUNK
    assert run(side, request).saves == []
    generated(request, *range(10))
    run(side, request)
    assert side.request_finished(request, list(range(10, 20))) is False


def test_a_producer_only_saves_and_a_consumer_only_loads(client: FakeClient) -> None:
    side, request = new_side(client, save=False), new_request(PROMPT)
    place(side, request)
    assert run(side, request).saves == []


@pytest.mark.parametrize(
    "more",
    [
        {"cache_salt": "pepper"},
        {"kv_transfer_params": {"lmcache.tag.tenant": "acme"}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_sets_a_request_apart_has_a_namespace_of_its_own(
    client: FakeClient, more: dict[str, Any]
) -> None:
    client.store(PROMPT)
    side, request = new_side(client), new_request(PROMPT, **more)
    assert place(side, request) == 0
    assert {save.namespace for save in run(side, request).saves} != {NAMESPACE.digest}


# Failures.


def test_after_a_failed_load_everything_is_offered_again(client: FakeClient) -> None:
    client.store(PROMPT[:CHUNK])
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    step = run(side, request)
    assert step.failures_seen == 0
    request.num_computed_tokens = 0  # as vLLM does when a load has failed
    side.update_connector_output(report(1))
    step = run(side, request)
    assert spans(step.saves) == [(0, 8), (8, 16), (16, 20)]
    assert step.failures_seen == 1


def test_the_same_report_twice_is_one_failure(client: FakeClient) -> None:
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    side.update_connector_output(report(1))
    run(side, request)
    side.update_connector_output(report(1))
    generated(request, 1)
    assert run(side, request).saves == []


def test_a_worker_that_gave_up_ends_lookups_and_saves(client: FakeClient) -> None:
    side = new_side(client)
    side.update_connector_output(report(0, "its pages are odd"))
    request = new_request(PROMPT)
    assert place(side, request) == 0
    assert run(side, request).saves == []
    assert client.calls == []


def test_steps_travel_to_workers_by_pickle(client: FakeClient) -> None:
    import pickle

    client.store(PROMPT[:CHUNK])
    side, request = new_side(client), new_request(PROMPT)
    place(side, request)
    step = run(side, request)
    assert pickle.loads(pickle.dumps(step)) == step
