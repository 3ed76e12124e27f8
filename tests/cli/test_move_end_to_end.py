"""The walk-through of moves, and the commands, through a real controller between two real cache
processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_kit.keys import Namespace, pack_tokens
from lmcache_kit.layout import KVLayout
from tests.cli.running import Kit, running_kits
from tests.support.stores import items_of, payload, store
from tests.support.waiting import eventually

TOKENS = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]
WORDS = [str(token) for token in TOKENS]
NAMESPACE = Namespace("meta-llama/Llama-3.1-8B-Instruct", KVLayout("float16", 4, 2, 64), 256)
ONE, TWO, ALONE = "lmcache_instance_1", "lmcache_instance_2", "alone"
SEED = {
    "old_position": [ONE, "LocalCPUBackend"],
    "new_position": [TWO, "LocalCPUBackend"],
    "tokens": TOKENS,
}
PEERS = {"enable_p2p": "true", "p2p_host": "localhost", "transfer_channel": "tcp"}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Kit]]:
    """Two that take part in moves and one that does not."""
    folder = tmp_path_factory.mktemp("kits")
    instances = {
        "one": {**PEERS, "lmcache_instance_id": ONE},
        "two": {**PEERS, "lmcache_instance_id": TWO},
        "alone": {"lmcache_instance_id": ALONE},
    }
    with running_kits(folder, NAMESPACE, instances) as found:
        yield found


@pytest.fixture
def one(kits: list[Kit]) -> Kit:
    """The first instance, which alone holds TOKENS."""
    first, second, _ = kits
    second.run("clear", "--all", "--force", "--instance", TWO)
    if "12 of 12" not in first.run("lookup", *WORDS, "--instance", ONE).output:
        with first.worker() as client:
            store(client, NAMESPACE, TOKENS)
    eventually(lambda: holders(first) == {ONE})
    return first


def holders(kit: Kit) -> set[str]:
    """Who is said to hold all of TOKENS."""
    _, reply = kit.ask("/lookup", {"tokens": TOKENS})
    return {name for name, (_, tokens) in reply["layout_info"].items() if tokens == len(TOKENS)}


def ended(kit: Kit, event_id: str) -> dict[str, Any]:
    kit.run("events", event_id, "--wait")
    event: dict[str, Any] = kit.ask(f"/events/{event_id}")[1]
    return event


def test_the_walk_through_moves_the_prompt(one: Kit, kits: list[Kit]) -> None:
    status, reply = one.ask("/move", SEED)
    assert (status, reply.pop("num_tokens"), list(reply)) == (200, 12, ["event_id"])
    event = ended(one, reply["event_id"])
    assert (event["state"], event["num_tokens"], event["message"]) == ("done", 12, "")
    assert (event["old_position"], event["new_position"]) == (
        SEED["old_position"],
        SEED["new_position"],
    )
    transfer = event["progress"][0]["transfer"]
    assert (transfer["transport"], transfer["bytes"]) == (
        "tcp",
        NAMESPACE.layout.payload_bytes(len(TOKENS)),
    )
    # The end of a move is told once lookups find it at the destination.
    assert TWO in holders(one)
    eventually(lambda: holders(one) == {TWO})
    with kits[1].worker() as client:
        found = client.lookup(NAMESPACE.digest, pack_tokens(TOKENS), NAMESPACE.chunk_size)
        memory = client.memory(found.incarnation)
        assert memory is not None
        [chunk], [item] = found.chunks, items_of(NAMESPACE, TOKENS)
        [extent] = chunk.extents
        assert bytes(memory[extent.offset : extent.offset + extent.nbytes]) == payload(item)


@pytest.mark.parametrize("word", ["copy", "should_copy"])
def test_7_a_copy_leaves_it_where_it_was(one: Kit, word: str) -> None:
    _, reply = one.ask("/move", {**SEED, word: True})
    assert ended(one, reply["event_id"])["state"] == "done"
    eventually(lambda: holders(one) == {ONE, TWO})


def test_what_is_pinned_stays_and_the_event_says_so(one: Kit) -> None:
    one.run("pin", *WORDS, "--instance", ONE)
    try:
        _, reply = one.ask("/move", SEED)
        event = ended(one, reply["event_id"])
    finally:
        one.run("unpin", *WORDS, "--instance", ONE)
    assert event["message"] == "the source keeps chunks: 1 that are pinned"
    assert holders(one) == {ONE, TWO}


def test_the_commands_do_the_same(one: Kit) -> None:
    done = one.run("move", *WORDS, "--from", ONE, "--to", TWO, "--wait")
    assert done.exit_code == 0, done.output
    assert re.match(
        r"done: 12 tokens; 1 of 1 chunk; 24\.0 KiB by tcp \(.+\), [\d.]+ [GM]B/s", done.stdout
    )
    row = one.run("events", "--operation", "move", "--instance", ONE, "--limit", "1").stdout
    assert f"{ONE} -> {TWO}" in row
    eventually(lambda: holders(one) == {TWO})
    back = one.run("move", "--all", "--from", TWO, "--to", ONE, "--wait")
    assert back.stdout.startswith("done: 12 tokens")
    eventually(lambda: holders(one) == {ONE})


def test_7_nothing_is_moved_of_what_is_not_there(one: Kit) -> None:
    status, reply = one.ask("/move", {**SEED, "tokens": [1, 2, 3]})
    assert (status, reply["num_tokens"]) == (200, 0)
    event = ended(one, reply["event_id"])
    assert event["message"] == "nothing of this is stored there"
    assert holders(one) == {ONE}


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"old_position": ["nobody", "LocalCPUBackend"]}, 404, "unknown_instance"),
        ({"new_position": ["nobody", "LocalCPUBackend"]}, 404, "unknown_instance"),
        ({"old_position": [ONE, "disk"]}, 404, "unknown_location"),
        ({"new_position": [TWO, "disk"]}, 404, "unknown_location"),
        ({"new_position": [ONE, "LocalCPUBackend"]}, 422, "invalid_request"),
        ({"new_position": [ALONE, "LocalCPUBackend"]}, 409, "conflict"),
        ({"old_position": [ALONE, "LocalCPUBackend"]}, 409, "conflict"),
    ],
)
def test_a_move_that_cannot_be_is_refused_and_changes_nothing(
    one: Kit, changes: dict[str, object], status: int, code: str
) -> None:
    given, reply = one.ask("/move", {**SEED, **changes})
    assert (given, reply["error"]["code"]) == (status, code)
    assert holders(one) == {ONE}
