"""Operations: what is asked of the controller, what is answered, and how they are followed."""

from __future__ import annotations

import msgspec
import pytest

from lmcache_kit.interfaces.frontend import InstancePin, PinList
from lmcache_kit.interfaces.operations import (
    Clear,
    Compress,
    Decompress,
    Pin,
    PinInfo,
    Unpin,
)
from lmcache_kit.keys import pack_tokens
from plugins.http_api.tests.conftest import TAKEN

SEED = {
    "tokens": [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13],
    "instance_id": "lmcache_default_instance",
    "location": "LocalCPUBackend",
}
PACKED = pack_tokens(SEED["tokens"])
CODEC_SEED = {**SEED, "method": "cachegen"}


async def test_the_seed_pins_and_is_answered_to_the_letter(client, controller):
    controller.end()
    assert await client.post("/pin", SEED) == (200, {"event_id": "e1", "num_tokens": 12})
    (operation,) = controller.submitted
    assert operation.instance_id == "lmcache_default_instance"
    assert controller.requests[0] == Pin(location="LocalCPUBackend", tokens=PACKED, pin_id="")


@pytest.mark.parametrize(("path", "kind"), [("/compress", Compress), ("/decompress", Decompress)])
async def test_the_seed_compresses_and_is_answered_at_once(client, controller, path, kind):
    assert await client.post(path, CODEC_SEED) == (200, {"event_id": "e1", "num_tokens": 12})
    (request,) = controller.requests
    assert request == kind(location="LocalCPUBackend", method="cachegen", tokens=PACKED)


@pytest.mark.parametrize("tokens", [{}, {"tokens": []}, {"tokens": None}])
@pytest.mark.parametrize("path", ["/compress", "/decompress"])
async def test_without_tokens_everything_is_compressed(client, controller, path, tokens):
    body = {"instance_id": "a", "location": "ram", "method": "cachegen", **tokens}
    assert (await client.post(path, body))[0] == 200
    assert controller.requests[0].tokens is None


async def test_clear_is_of_a_whole_location_or_of_tokens(client, controller):
    controller.end()
    place = {"instance_id": "a", "location": "ram"}
    await client.post("/clear", place)
    await client.post("/clear", {**place, "tokens": [1, 2], "force": True})
    assert controller.requests == [
        Clear(location="ram"),
        Clear(location="ram", tokens=pack_tokens([1, 2]), force=True),
    ]


async def test_unpin_is_of_tokens_or_of_one_pin(client, controller):
    controller.end()
    place = {"instance_id": "a", "location": "ram"}
    await client.post("/unpin", {**place, "tokens": [1, 2]})
    await client.post("/unpin", {**place, "pin_id": "p1"})
    assert controller.requests == [
        Unpin(location="ram", tokens=pack_tokens([1, 2])),
        Unpin(location="ram", pin_id="p1"),
    ]


async def test_every_option_is_passed_on(client, controller):
    controller.end()
    await client.post(
        "/pin",
        {
            **SEED,
            "model": "m",
            "cache_salt": "s",
            "ttl_s": 60,
            "owner": "me",
            "deadline_s": 5,
            "idempotency_key": "k",
        },
    )
    (operation,) = controller.submitted
    assert (operation.deadline_s, operation.idempotency_key) == (5, "k")
    assert controller.requests[0] == Pin(
        location="LocalCPUBackend",
        tokens=PACKED,
        model="m",
        cache_salt="s",
        pin_id="",
        owner="me",
        ttl_s=60,
    )


async def test_less_than_all_is_said_beside_the_count(client, controller):
    controller.end(state="partial", tokens=8, message="the budget holds 8 tokens more")
    status, reply = await client.post("/pin", SEED)
    assert status == 200
    assert reply == {
        "event_id": "e1",
        "num_tokens": 8,
        "message": "the budget holds 8 tokens more",
    }


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        ("failed", 502, "operation_failed"),
        ("expired", 504, "deadline_exceeded"),
        ("cancelled", 409, "conflict"),
    ],
)
async def test_another_end_is_an_error_that_names_the_event(
    client, controller, state, status, code
):
    controller.end(state=state, tokens=0, message="because")
    given, shown, message, _ = await client.error("/pin", SEED)
    assert (given, shown, message) == (status, code, "event e1: because")


async def test_one_that_goes_on_past_the_time_for_an_answer_is_named(serve, controller):
    client = await serve(request_timeout_s=0.2)
    status, code, message, hint = await client.error("/pin", SEED)
    assert (status, code, message) == (504, "deadline_exceeded", "event e1 goes on")
    assert hint == "Ask GET /events/e1 later"


async def test_an_event_is_shown_with_its_progress(client, controller):
    controller.known = [controller.taken]
    status, reply = await client.send("GET", "/events/e1")
    assert status == 200
    assert reply == {
        "event_id": "e1",
        "operation": "compress",
        "instance_id": "a",
        "location": "ram",
        "old_position": None,
        "new_position": None,
        "state": "running",
        "num_tokens": 12,
        "message": "",
        "ratio": 6.0,
        "progress": [
            {
                "instance_id": "a",
                "location": "ram",
                "worker_ids": [0, 1],
                "chunks_done": 1,
                "chunks": 3,
                "bytes_before": 600,
                "bytes_after": 100,
                "transfer": None,
            }
        ],
        "created": 100.0,
        "started": 100.5,
        "ended": None,
        "deadline": 700.0,
        "idempotency_key": None,
    }


async def test_events_are_listed_and_chosen_from(client, controller):
    other = msgspec.structs.replace(
        controller.taken, operation_id="e2", kind="pin", instance_id="b", state="done"
    )
    controller.known = [other, controller.taken]

    async def listed(query):
        status, reply = await client.send("GET", f"/events{query}")
        assert status == 200
        return [event["event_id"] for event in reply["events"]]

    assert await listed("") == ["e2", "e1"]
    assert await listed("?limit=1") == ["e2"]
    assert await listed("?state=running") == ["e1"]
    assert await listed("?operation=pin") == ["e2"]
    assert await listed("?instance_id=b&operation=compress") == []


async def test_check_finish_answers_as_lmcache_should(client, controller):
    controller.known = [controller.taken]
    assert await client.post("/check_finish", {"event_id": "e1"}) == (200, {"status": "running"})


async def test_a_cancel_needs_no_body(client, controller):
    controller.known = [controller.taken]
    status, reply = await client.send("POST", "/events/e1/cancel")
    assert (status, reply["state"]) == (200, "cancelled")
    status, reply = await client.send("POST", "/events/e1/cancel", data=b"not read")
    assert status == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/events/x", None),
        ("GET", "/events/{event_id}", None),
        ("POST", "/events/x/cancel", None),
        ("POST", "/check_finish", {"event_id": "x"}),
    ],
)
async def test_an_unknown_event_is_404_and_lists_the_latest(client, controller, method, path, body):
    controller.known = [controller.taken]
    status, reply = await client.send(method, path, json=body)
    assert (status, reply["error"]["code"]) == (404, "unknown_event")
    assert reply["error"]["hint"] == "Known: e1"


async def test_pins_are_listed(client, controller):
    pin = PinInfo("p1", "ram", 12, 3, 960, "me", 59.5)
    controller.pinned = PinList((InstancePin("a", pin),), ("b",))
    assert await client.send("GET", "/pins") == (
        200,
        {
            "pins": [
                {
                    "pin_id": "p1",
                    "instance_id": "a",
                    "location": "ram",
                    "num_tokens": 12,
                    "chunks": 3,
                    "bytes": 960,
                    "owner": "me",
                    "expires_in_s": 59.5,
                }
            ],
            "unanswered": ["b"],
        },
    )
    await client.send("GET", "/pins?instance_id=a&location=ram")
    assert controller.pin_queries == [(None, None), ("a", "ram")]


async def test_operations_ask_for_the_token_as_everything_does(serve):
    client = await serve(token="secret")
    for method, path in (("GET", "/pins"), ("GET", "/events/e1"), ("POST", "/clear")):
        assert (await client.send(method, path))[0] == 401


async def test_the_controller_learns_who_asked(client, controller):
    controller.end()
    controller.known = [TAKEN]
    place = {"instance_id": "a", "location": "ram"}
    await client.post("/clear", place)
    await client.send("POST", "/events/e1/cancel")
    assert controller.callers == ["127.0.0.1", "127.0.0.1"]
