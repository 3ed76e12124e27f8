"""Moves: what is asked of which instance, and what is answered."""

from __future__ import annotations

import msgspec
import pytest

from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit.interfaces.frontend import EventPart
from lmcache_kit.interfaces.operations import Move, Progress, Transfer
from lmcache_kit.keys import pack_tokens

SEED = {
    "old_position": ["lmcache_instance_1", "LocalCPUBackend"],
    "new_position": ["lmcache_instance_2", "LocalCPUBackend"],
    "tokens": [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13],
}
PLACES = {"old_position": ["a", "ram"], "new_position": ["b", "disk"]}
TRANSFER = Transfer("nixl", "CMA on one host", 2_000_000_000, 0.5)


@pytest.fixture(autouse=True)
def _moves(controller):
    controller.taken = msgspec.structs.replace(
        controller.taken,
        operation="move",
        instance_id="b",
        location="disk",
        source=("a", "ram"),
        ratio=None,
        parts=(EventPart("b", "disk", (0,), Progress(1, 3, 600, 600, TRANSFER)),),
    )


def ended(controller, state, **changes):
    """It ended so before it began."""
    controller.taken = msgspec.structs.replace(
        controller.taken, state=state, tokens=0, started=None, **changes
    )


async def test_the_seed_moves_and_is_answered_to_the_letter(client, controller):
    assert await client.post("/move", SEED) == (200, {"event_id": "e1", "num_tokens": 12})
    (operation,) = controller.operations
    assert operation.instance_id == "lmcache_instance_2"
    assert controller.records[0] == Move(
        location="LocalCPUBackend",
        tokens=pack_tokens(SEED["tokens"]),
        source="lmcache_instance_1",
        source_location="LocalCPUBackend",
    )


async def test_every_option_is_passed_on(client, controller):
    more = {"model": "m", "cache_salt": "s", "deadline_s": 5, "idempotency_key": "k"}
    await client.post("/move", {**PLACES, "tokens": [1, 2], "copy": True, **more})
    (operation,) = controller.operations
    assert (operation.instance_id, operation.deadline_s, operation.idempotency_key) == ("b", 5, "k")
    assert controller.records[0] == Move(
        location="disk",
        tokens=pack_tokens([1, 2]),
        cache_salt="s",
        model="m",
        source="a",
        source_location="ram",
        copy=True,
    )


@pytest.mark.parametrize("tokens", [{}, {"tokens": []}, {"tokens": None}])
async def test_without_tokens_everything_is_moved(client, controller, tokens):
    assert (await client.post("/move", {**PLACES, **tokens}))[0] == 200
    assert controller.records[0].tokens is None


@pytest.mark.parametrize(
    ("said", "copy"),
    [
        ({}, False),
        ({"copy": False}, False),
        ({"copy": True}, True),
        ({"should_copy": True}, True),
        ({"should_copy": False}, False),
        ({"should_copy": None}, False),
        ({"copy": True, "should_copy": True}, True),
        ({"copy": True, "should_copy": None}, True),
    ],
)
async def test_7_that_the_source_keeps_it_is_never_ignored(client, controller, said, copy):
    assert (await client.post("/move", {**PLACES, **said}))[0] == 200
    assert controller.records[0].copy is copy


@pytest.mark.parametrize("copy", [True, False])
async def test_two_wishes_that_differ_are_refused(client, controller, copy):
    said = {**PLACES, "copy": copy, "should_copy": not copy}
    status, code, message, _ = await client.error("/move", said)
    assert (status, code) == (422, "invalid_request")
    assert message == "the body: copy and should_copy say different things"
    assert controller.operations == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_position": None}, "old_position: input should be a valid array"),
        ({"old_position": "a"}, "old_position: input should be a valid array"),
        ({"old_position": ["a"]}, "old_position[1]: required, and missing"),
        ({"old_position": ["a", "ram", "x"]}, "old_position: "),
        ({"new_position": ["", "ram"]}, "new_position[0]: string should have at least 1 char"),
        ({"new_position": ["b", 7]}, "new_position[1]: input should be a valid string, got 7"),
        ({"new_position": ["b" * 257, "ram"]}, "new_position[0]: string should have at most 256"),
        ({"tokens": [1, -1]}, "tokens[1]: input should be greater than or equal to 0, got -1"),
        ({"copy": "yes"}, "copy: input should be a valid boolean, got 'yes'"),
        ({"copy_": True}, "copy_: unknown field"),
        ({"instance_id": "b"}, "instance_id: unknown field"),
        ({"deadline_s": 0}, "deadline_s: "),
    ],
)
async def test_what_is_wrong_is_named(client, controller, changes, message):
    status, code, told, hint = await client.error("/move", {**PLACES, **changes})
    assert (status, code) == (422, "invalid_request")
    assert told.startswith(message)
    assert "old_position, new_position, copy, should_copy" in hint
    assert controller.operations == []


async def test_a_position_is_required(client):
    _, _, message, _ = await client.error("/move", {"old_position": ["a", "ram"]})
    assert message == "new_position: required, and missing"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (UnknownName("instance", "a", ["b"]), 404, "unknown_instance"),
        (UnknownName("location", "ram", ["disk"]), 404, "unknown_location"),
        (ControlError("instance 'a' takes no part in moves"), 409, "conflict"),
        (InvalidQuery("source and destination are the same"), 422, "invalid_request"),
        (OperationFailed("event e1: 'a' does not answer"), 502, "operation_failed"),
        (NoWorker("instance 'a' has not been heard of"), 503, "no_worker"),
        (DeadlineExceeded("instance 'b' did not take on 'move'"), 504, "deadline_exceeded"),
    ],
)
async def test_what_the_controller_raises_has_its_status(client, controller, failure, status, code):
    controller.failure = failure
    given, shown, message, _ = await client.error("/move", PLACES)
    assert (given, shown, message) == (status, code, failure.message)


@pytest.mark.parametrize(
    ("state", "status"), [("failed", 502), ("expired", 504), ("cancelled", 409)]
)
async def test_7_one_that_never_began_is_no_success(client, controller, state, status):
    ended(controller, state, message="because")
    given, _, message, _ = await client.error("/move", PLACES)
    assert (given, message) == (status, "event e1: because")


async def test_nothing_to_move_is_said_beside_the_count(client, controller):
    ended(controller, "done", message="nothing of this is stored at 'a'")
    assert await client.post("/move", PLACES) == (
        200,
        {"event_id": "e1", "num_tokens": 0, "message": "nothing of this is stored at 'a'"},
    )


async def test_an_event_shows_both_ends_and_over_what_the_bytes_come(client, controller):
    controller.ledger = [controller.taken]
    _, reply = await client.send("GET", "/events/e1")
    assert (reply["operation"], reply["instance_id"], reply["location"]) == ("move", "b", "disk")
    assert (reply["old_position"], reply["new_position"]) == (["a", "ram"], ["b", "disk"])
    assert reply["progress"][0]["transfer"] == {
        "transport": "nixl",
        "how": "CMA on one host",
        "bytes": 2_000_000_000,
        "seconds": 0.5,
        "gb_per_s": 4.0,
    }


async def test_moves_are_found_by_either_end(client, controller):
    controller.ledger = [controller.taken]
    for name, count in (("a", 1), ("b", 1), ("c", 0), ("ram", 0)):
        _, reply = await client.send("GET", f"/events?instance_id={name}&operation=move")
        assert len(reply["events"]) == count
