"""Moves between two caches: what comes, what goes, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout

if TYPE_CHECKING:
    from .conftest import MakePlace, Place

LAYOUT = KVLayout("bfloat16", layers=2, kv_heads=2, head_dim=64)
BASE = Namespace("acme/model", LAYOUT, 16)
CHUNK_BYTES = LAYOUT.payload_bytes(16)


@pytest.mark.parametrize("channel", ["tcp", "nixl"])
def test_a_prompt_moves_and_its_source_forgets_it(make_place: MakePlace, channel: str) -> None:
    source = make_place("source", transfer_channel=channel)
    goal = make_place("goal", transfer_channel=channel)
    tokens = range(12)
    source.store(tokens)
    outcome = goal.move(source, tokens)
    assert (outcome.state, outcome.tokens, outcome.message) == ("done", 12, "")
    assert (outcome.progress.chunks_done, outcome.progress.chunks) == (1, 1)
    transfer = outcome.progress.transfer
    assert transfer is not None
    assert (transfer.transport, transfer.nbytes) == (channel, LAYOUT.payload_bytes(12))
    assert transfer.seconds > 0
    assert (goal.hit(tokens), source.hit(tokens)) == (12, 0)


def test_a_copy_leaves_the_source_as_it_is(source: Place, goal: Place) -> None:
    source.store(range(40))
    outcome = goal.move(source, range(40), copy=True)
    assert (outcome.state, outcome.tokens) == ("done", 40)
    assert (goal.hit(range(40)), source.hit(range(40))) == (40, 40)
    assert goal.asked_to_confirm == 0


def test_without_tokens_everything_moves(source: Place, goal: Place) -> None:
    prompts = [range(start, start + 40) for start in (0, 1000, 2000)]
    for prompt in prompts:
        source.store(prompt)
    outcome = goal.move(source)
    assert (outcome.state, outcome.tokens, outcome.progress.chunks_done) == ("done", 120, 9)
    assert [goal.hit(prompt) for prompt in prompts] == [40, 40, 40]
    assert source.everything() == set()


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_ranks_payload_moves_to_the_same_rank(make_place: MakePlace, ranks: int) -> None:
    base = Namespace("acme/model", LAYOUT, 16, tensor_parallel=ranks)
    source = make_place("source", base=base, ranks=ranks)
    goal = make_place("goal", base=base, ranks=ranks)
    source.store(range(40))
    assert goal.move(source, range(40)).tokens == 40
    assert goal.hit(range(40)) == 40


def test_of_a_prompt_only_its_stored_beginning_moves(source: Place, goal: Place) -> None:
    source.store(range(20))
    outcome = goal.move(source, range(50))
    assert (outcome.state, outcome.tokens) == ("done", 20)


def test_the_number_of_tokens_is_known_before_the_first_byte_moves(
    source: Place, goal: Place
) -> None:
    source.store(range(40))
    running = goal.begin(goal.order(source, range(40)))
    assert running.outcome.state == "done"
    assert running.job.accepted is not None
    assert (running.job.accepted.tokens, running.job.accepted.chunks) == (40, 3)
    assert running.reports[0].chunks_done == 0
    assert running.reports[-1].chunks_done == 3


def test_what_others_follow_stays_at_the_source_and_is_named(source: Place, goal: Place) -> None:
    shared = list(range(32))
    source.store([*shared, *range(100, 110)])
    source.store([*shared, *range(200, 210)])
    outcome = goal.move(source, [*shared, *range(100, 110)])
    assert (outcome.state, outcome.tokens) == ("done", 42)
    assert outcome.message == "the source keeps chunks: 2 that others there follow"
    assert goal.hit([*shared, *range(100, 110)]) == 42
    assert source.hit([*shared, *range(200, 210)]) == 42
    assert source.hit([*shared, *range(100, 110)]) == 32


def test_a_pinned_chunk_stays_and_so_does_what_it_follows(source: Place, goal: Place) -> None:
    source.store(range(40))
    source.engine.pin(None, pack_tokens(range(32)), "p")
    outcome = goal.move(source, range(40))
    assert (outcome.state, outcome.tokens) == ("done", 40)
    assert outcome.message == "the source keeps chunks: 2 that are pinned"
    assert (goal.hit(range(40)), source.hit(range(40))) == (40, 32)


def test_a_pin_that_comes_while_the_chunks_move_holds(source: Place, goal: Place) -> None:
    source.store(range(40))
    goal.before_confirm = lambda: source.engine.pin(None, None, "late")
    assert goal.move(source, range(40)).state == "done"
    assert (goal.hit(range(40)), source.hit(range(40))) == (40, 40)


def test_what_is_here_already_is_not_read_again(source: Place, goal: Place) -> None:
    source.store(range(40))
    goal.store(range(32))
    outcome = goal.move(source, range(40))
    assert (outcome.state, outcome.tokens) == ("done", 40)
    assert outcome.message == "2 of 3 chunks were here already"
    assert outcome.progress.transfer is not None
    assert outcome.progress.transfer.nbytes == LAYOUT.payload_bytes(8)
    assert (goal.hit(range(40)), source.hit(range(40))) == (40, 0)


def test_moving_what_nobody_stored_moves_nothing_and_says_so(source: Place, goal: Place) -> None:
    outcome = goal.move(source, range(12))
    assert (outcome.state, outcome.tokens) == ("done", 0)
    assert outcome.message == "nothing of this is stored there"


def test_a_full_destination_is_told_and_the_source_loses_nothing(
    make_place: MakePlace, source: Place
) -> None:
    goal = make_place("goal", mib=4 * CHUNK_BYTES / (1 << 20))
    source.store(range(96))
    before = source.everything()
    outcome = goal.move(source, range(96))
    assert outcome.state == "partial"
    assert (outcome.tokens, outcome.progress.chunks_done) == (64, 4)
    assert outcome.message.startswith("there is no room here for 2 of 6 chunks; the source keeps")
    assert goal.hit(range(96)) == 64
    assert source.everything() == before
    assert source.hit(range(96)) == 96


def test_of_several_prompts_those_that_came_whole_leave_a_source_whose_destination_is_full(
    make_place: MakePlace, source: Place
) -> None:
    goal = make_place("goal", mib=4 * CHUNK_BYTES / (1 << 20))
    prompts = [range(start, start + 16) for start in range(0, 6000, 1000)]
    for prompt in prompts:
        source.store(prompt)
    outcome = goal.move(source)
    assert (outcome.state, outcome.progress.chunks_done) == ("partial", 4)
    assert [goal.hit(prompt) + source.hit(prompt) for prompt in prompts] == [16] * 6


def test_a_destination_evicts_what_is_old_but_nothing_of_this_move(
    make_place: MakePlace, source: Place
) -> None:
    goal = make_place("goal", mib=4 * CHUNK_BYTES / (1 << 20))
    goal.store(range(5000, 5064))
    source.store(range(64))
    assert goal.move(source, range(64)).state == "done"
    assert (goal.hit(range(64)), goal.hit(range(5000, 5064))) == (64, 0)
    assert source.everything() == set()


def test_a_destination_whose_chunks_are_pinned_takes_nothing(
    make_place: MakePlace, source: Place
) -> None:
    goal = make_place("goal", mib=2 * CHUNK_BYTES / (1 << 20))
    goal.store(range(5000, 5032))
    match = goal.engine.lookup(BASE.digest, pack_tokens(range(5000, 5032)), 16, 1, "reader")
    source.store(range(32))
    outcome = goal.move(source, range(32))
    assert (outcome.state, outcome.tokens) == ("failed", 0)
    assert "no room here for 2 of 2 chunks" in outcome.message
    assert source.hit(range(32)) == 32
    goal.engine.release(match.lease, None)


def test_chunks_that_left_the_source_meanwhile_are_counted(source: Place, goal: Place) -> None:
    source.store(range(40))
    lease = source.engine.transfers.lease

    def evict_first(*call: object) -> object:
        source.engine.clear(None, pack_tokens(range(40)))
        return lease(*call)  # type: ignore[arg-type]

    source.engine.transfers.lease = evict_first  # type: ignore[method-assign, assignment]
    outcome = goal.move(source, range(40))
    assert (outcome.state, outcome.tokens) == ("done", 0)
    assert outcome.message == "3 of 3 chunks had gone meanwhile"


def test_a_prompt_with_a_salt_moves_within_its_salt(source: Place, goal: Place) -> None:
    salted = BASE.variant(cache_salt="s")
    source.store(range(16), salted)
    source.store(range(16))
    assert goal.move(source, range(16), salt="s").tokens == 16
    assert (goal.hit(range(16), salted), goal.hit(range(16))) == (16, 0)
    assert (source.hit(range(16), salted), source.hit(range(16))) == (0, 16)


def test_everything_takes_salted_prompts_along(source: Place, goal: Place) -> None:
    salted = BASE.variant(cache_salt="s", lora="l")
    source.store(range(16), salted)
    assert goal.move(source).tokens == 16
    assert goal.hit(range(16), salted) == 16


def test_a_destination_that_serves_nothing_yet_takes_what_comes(
    make_place: MakePlace, source: Place
) -> None:
    goal = make_place("goal", base=None)
    source.store(range(40))
    assert goal.move(source).state == "done"
    assert goal.hit(range(40)) == 40


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Namespace("acme/other", LAYOUT, 16), "model is acme/model there and acme/other here"),
        (
            Namespace("acme/model", KVLayout("float16", 2, 2, 64), 16),
            "dtype is bfloat16 there and float16 here",
        ),
        (Namespace("acme/model", LAYOUT, 256), "chunk_size is 16 there and 256 here"),
        (
            Namespace("acme/model", LAYOUT, 16, tensor_parallel=2),
            "tensor_parallel is 1 there and 2 here",
        ),
        (
            Namespace("acme/model", KVLayout("bfloat16", 3, 2, 64), 16),
            "layers is 2 there and 3 here",
        ),
    ],
    ids=["model", "dtype", "chunk size", "tensor parallelism", "layers"],
)
def test_what_is_of_no_use_to_the_destination_is_refused_and_the_field_is_named(
    make_place: MakePlace, source: Place, other: Namespace, said: str
) -> None:
    goal = make_place("goal", base=other)
    source.store(range(40))
    outcome = goal.move(source, range(40))
    assert (outcome.state, outcome.tokens) == ("failed", 0)
    assert said in outcome.message
    assert source.hit(range(40)) == 40
    assert goal.everything() == set()


def test_of_two_models_the_shared_one_moves(make_place: MakePlace, source: Place) -> None:
    other = Namespace("acme/other", LAYOUT, 16)
    goal = make_place("goal")
    source.namespaces.register(other)
    source.store(range(16))
    source.store(range(16), other)
    outcome = goal.move(source)
    assert (outcome.state, outcome.tokens) == ("partial", 16)
    assert "1 chunks are of no use here: model is acme/other" in outcome.message
    assert (source.hit(range(16)), source.hit(range(16), other)) == (0, 16)


def test_a_model_that_the_source_does_not_know_is_refused(source: Place, goal: Place) -> None:
    outcome = goal.move(source, range(16), model="nobody/none")
    assert outcome.state == "failed"
    assert "unknown model 'nobody/none'" in outcome.message


def test_compressed_chunks_move_compressed(source: Place, goal: Place) -> None:
    tokens = range(48)
    source.store(tokens)
    codec = source.codecs.get("cachegen")
    for key, _ in source.engine.keys(None, None):
        assert source.engine.encode(key, "cachegen", codec).status == "done"
    weight = int(source.stats()["requested_bytes"])
    assert weight < 3 * CHUNK_BYTES
    outcome = goal.move(source, tokens)
    assert (outcome.state, outcome.tokens) == ("done", 48)
    assert outcome.progress.transfer is not None
    assert outcome.progress.transfer.nbytes == weight
    assert goal.stats()["encoded_chunks"] == 3
    assert goal.stats()["requested_bytes"] == weight
    match = goal.engine.lookup(BASE.digest, pack_tokens(tokens), 16, 1, "reader", 30)
    assert match.chunks[-1].end == 48
    goal.engine.release(match.lease, None)
    assert goal.engine.decode(goal.engine.keys(None, None)[0][0], "cachegen").status == "done"


def test_a_raw_chunk_that_moved_can_be_compressed(source: Place, goal: Place) -> None:
    source.store(range(16))
    goal.move(source, range(16))
    [(key, _)] = goal.engine.keys(None, None)
    assert goal.engine.encode(key, "cachegen", goal.codecs.get("cachegen")).status == "done"


def test_what_the_destination_could_not_decode_stays_where_it_is(
    make_place: MakePlace, source: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.store(range(16))
    [(key, _)] = source.engine.keys(None, None)
    source.engine.encode(key, "cachegen", source.codecs.get("cachegen"))
    monkeypatch.setenv("LMCACHE_KIT_PLUGINS", "-cachegen")
    goal = make_place("goal")
    outcome = goal.move(source, range(16))
    assert (outcome.state, outcome.tokens) == ("failed", 0)
    assert "encoded with cachegen" in outcome.message
    assert "LMCACHE_KIT_PLUGINS keeps out" in outcome.message
    assert key in source.everything()


@pytest.mark.parametrize("channel", ["tcp", "nixl"])
def test_a_chunk_that_is_corrupt_at_the_source_goes_and_the_rest_of_its_prompt_stays(
    make_place: MakePlace, channel: str
) -> None:
    source = make_place("source", transfer_channel=channel)
    goal = make_place("goal", transfer_channel=channel)
    source.store(range(48))
    source.store(range(1000, 1016))
    match = source.engine.lookup(BASE.digest, pack_tokens(range(48)), 16, 1, "reader")
    _, second, third = match.chunks
    source.memory.memory[second.extents[0].offset + 5] ^= 1
    source.engine.release(match.lease, None)
    outcome = goal.move(source)
    assert outcome.state == "done"
    assert "1 of 4 chunks had gone meanwhile" in outcome.message
    assert second.key not in source.everything() | goal.everything()
    assert source.stats()["corrupt_total"] == 1
    assert third.key in source.everything()
    assert goal.hit(range(48)) == 16
    assert (goal.hit(range(1000, 1016)), source.hit(range(1000, 1016))) == (16, 0)


def test_another_move_is_quicker_over_the_link_that_is_there(source: Place, goal: Place) -> None:
    for start in (0, 100, 200):
        source.store(range(start, start + 16))
        assert goal.move(source, range(start, start + 16)).state == "done"
    assert len(goal.node._links._idle) == 1


def test_moves_in_both_directions_at_once_lose_nothing(make_place: MakePlace) -> None:
    one, other = make_place("one"), make_place("other")
    prompts = [range(start, start + 40) for start in range(0, 4000, 100)]
    for prompt in prompts:
        one.store(prompt)
        other.store(prompt)
    moves = [one.begin(one.order(other)), other.begin(other.order(one))]
    assert all(move.outcome.state in ("done", "partial") for move in moves)
    assert all(max(one.hit(prompt), other.hit(prompt)) == 40 for prompt in prompts)


def test_a_chunk_that_another_move_brings_is_not_given_away_meanwhile(
    make_place: MakePlace, source: Place, goal: Place
) -> None:
    third = make_place("third")
    source.store(range(16))
    seen: list[str] = []

    def take_further() -> None:
        further = third.move(goal, range(16))
        seen.append(f"{further.state}: {further.message}")

    goal.before_confirm = take_further
    assert goal.move(source, range(16)).state == "done"
    assert seen == ["done: the source keeps chunks: 1 that other moves need"]
    assert (source.hit(range(16)), goal.hit(range(16)), third.hit(range(16))) == (0, 16, 16)


def test_a_chunk_that_is_dropped_here_before_the_end_stays_at_the_source(
    source: Place, goal: Place
) -> None:
    source.store(range(16))

    def drop() -> None:
        [key] = goal.everything()
        goal.engine.drop_corrupt(key)

    goal.before_confirm = drop
    goal.move(source, range(16))
    assert (goal.hit(range(16)), source.hit(range(16))) == (0, 16)


def test_without_the_controllers_word_the_source_keeps_everything(
    source: Place, goal: Place
) -> None:
    source.store(range(40))
    goal.confirms = False
    outcome = goal.move(source, range(40))
    assert (outcome.state, outcome.tokens) == ("partial", 40)
    assert "the controller did not confirm" in outcome.message
    assert (goal.hit(range(40)), source.hit(range(40))) == (40, 40)


def test_the_source_forgets_only_after_the_controllers_word(source: Place, goal: Place) -> None:
    source.store(range(40))
    seen: list[tuple[int, int]] = []
    goal.before_confirm = lambda: seen.append((source.hit(range(40)), goal.hit(range(40))))
    goal.move(source, range(40))
    assert seen == [(40, 40)]
    assert source.hit(range(40)) == 0


@pytest.mark.parametrize("step", ["lease", "reserve", "delete"])
def test_a_defect_at_either_end_ends_the_move_and_loses_nothing(
    source: Place, goal: Place, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    source.store(range(40))
    engine = (goal if step == "reserve" else source).engine
    part = engine if step == "delete" else engine.transfers

    def fail(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    setattr(part, step, fail)
    outcome = goal.move(source, range(40))
    assert outcome.state in ("failed", "partial")
    assert outcome.message
    assert source.hit(range(40)) == 40
    delattr(part, step)
    assert goal.move(source, range(40)).state == "done"


def test_the_transport_that_cannot_be_used_is_named_with_its_reason(
    make_place: MakePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lmcache_kit_nixl_transport.probe.why_not", lambda: "no NIXL on this machine"
    )
    source = make_place("source", transfer_channel="nixl")
    goal = make_place("goal", transfer_channel="nixl")
    source.store(range(16))
    outcome = goal.move(source, range(16))
    assert outcome.state == "done"
    assert outcome.progress.transfer is not None
    assert outcome.progress.transfer.transport == "tcp"
    assert "not nixl: " in outcome.progress.transfer.how
    assert "no NIXL on this machine" in outcome.progress.transfer.how


def test_auto_takes_nixl_on_one_host(make_place: MakePlace) -> None:
    source = make_place("source", transfer_channel="auto")
    goal = make_place("goal", transfer_channel="auto")
    source.store(range(16))
    transfer = goal.move(source, range(16)).progress.transfer
    assert transfer is not None
    assert (transfer.transport, transfer.how) == ("nixl", "CMA on one host")


def test_two_sides_that_allow_different_transports_say_so(make_place: MakePlace) -> None:
    source = make_place("source", transfer_channel="tcp")
    goal = make_place("goal", transfer_channel="auto")
    source.store(range(16))
    transfer = goal.move(source, range(16)).progress.transfer
    assert transfer is not None
    assert transfer.transport == "tcp"
    assert "not nixl: at instance 'source': not used" in transfer.how


def test_windows_are_bounded_by_the_memory(make_place: MakePlace) -> None:
    source, goal = make_place("source", mib=1), make_place("goal", mib=1)
    asked: list[int] = []
    lease: Callable[..., object] = source.engine.transfers.lease

    def count(keys: list[bytes], owner: object) -> object:
        asked.append(len(keys))
        return lease(keys, owner)

    source.engine.transfers.lease = count  # type: ignore[method-assign, assignment]
    source.store(range(16 * 32))
    assert goal.move(source).state == "done"
    assert sum(asked) == 32
    assert max(asked) * CHUNK_BYTES <= (1 << 20) / 8
