"""POST /lookup answers in the form that LMCache's users know."""

from __future__ import annotations

import json
import struct

import pytest
from lmcache_kit_http_api.models import LookupReply

from lmcache_kit.errors import UnknownName

SEED_TOKENS = [128000, 849, 21435, 279, 26431, 315, 85748, 6636, 304, 4221, 4211, 13]


async def test_the_documented_request_has_the_documented_reply(client, controller):
    controller.matches = {"lmcache_default_instance": [("LocalCPUBackend", 12)]}
    status, reply = await client.post("/lookup", {"tokens": SEED_TOKENS})
    assert status == 200
    assert reply == {
        "event_id": "event-1",
        "lmcache_default_instance": ["LocalCPUBackend", 12],
        "layout_info": {"lmcache_default_instance": ["LocalCPUBackend", 12]},
    }
    assert list(controller.queries[0].tokens) == SEED_TOKENS


async def test_nobody_holds_it_so_only_the_event_and_an_empty_layout_come_back(client):
    assert await client.post("/lookup", {"tokens": [1]}) == (
        200,
        {"event_id": "event-1", "layout_info": {}},
    )


async def test_every_instance_is_named_with_its_longest_location(client, controller):
    controller.matches = {"a": [("LocalCPUBackend", 8), ("Disk", 4)], "b": [("Disk", 4)]}
    _, reply = await client.post("/lookup", {"tokens": [1]})
    assert reply["layout_info"] == {"a": ["LocalCPUBackend", 8], "b": ["Disk", 4]}
    assert (reply["a"], reply["b"]) == (["LocalCPUBackend", 8], ["Disk", 4])


@pytest.mark.parametrize("taken", ["event_id", "layout_info", "detail", "error"])
async def test_an_instance_named_like_a_field_stands_in_layout_info_only(client, controller, taken):
    controller.matches = {taken: [("LocalCPUBackend", 3)]}
    _, reply = await client.post("/lookup", {"tokens": [1, 2, 3]})
    assert reply["layout_info"] == {taken: ["LocalCPUBackend", 3]}
    assert reply["event_id"] == "event-1"
    assert set(reply) == {"event_id", "layout_info"}


@pytest.mark.parametrize("name", ["model_config", "__class__", "self", "\x00", "ключ", "a.b"])
async def test_any_other_instance_id_stands_in_both_places(client, controller, name):
    controller.matches = {name: [("LocalCPUBackend", 3)]}
    _, reply = await client.post("/lookup", {"tokens": [1, 2, 3]})
    assert reply[name] == reply["layout_info"][name] == ["LocalCPUBackend", 3]


async def test_detail_tells_every_location_and_why_its_match_stopped(client, controller):
    controller.matches = {"a": [("LocalCPUBackend", 8), ("Disk", 4)]}
    _, reply = await client.post("/lookup", {"tokens": [1], "detail": True})
    assert reply["detail"] == {
        "a": [
            {"location": "LocalCPUBackend", "tokens": 8, "stopped": "missing"},
            {"location": "Disk", "tokens": 4, "stopped": "missing"},
        ]
    }


async def test_model_salt_and_instance_reach_the_controller(client, controller):
    asked = {"tokens": [1], "model": "llama", "cache_salt": "s", "instance_id": "a"}
    assert (await client.post("/lookup", asked))[0] == 200
    query = controller.queries[0]
    assert (query.model, query.cache_salt, query.instance_id) == ("llama", "s", "a")


async def test_null_for_an_optional_field_is_as_if_it_were_absent(client, controller):
    asked = {"tokens": [1], "model": None, "cache_salt": None, "instance_id": None}
    assert (await client.post("/lookup", asked))[0] == 200
    query = controller.queries[0]
    assert (query.model, query.cache_salt, query.instance_id) == (None, "", None)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "x"])
async def test_the_content_type_does_not_matter_when_the_body_is_json(client, content_type):
    status, _ = await client.send(
        "POST", "/lookup", data=b'{"tokens": [1]}', headers={"Content-Type": content_type}
    )
    assert status == 200


async def test_the_largest_token_is_accepted_and_no_token_at_all_finds_nothing(client):
    assert (await client.post("/lookup", {"tokens": [0, 2**32 - 1]}))[0] == 200
    assert (await client.post("/lookup", {"tokens": []}))[0] == 200


@pytest.mark.parametrize("detail", [False, True])
async def test_the_reply_is_one_of_the_documented_model(client, controller, detail):
    controller.matches = {"a": [("LocalCPUBackend", 8)], "event_id": [("Disk", 4)]}
    _, reply = await client.post("/lookup", {"tokens": [1], "detail": detail})
    shown = LookupReply.model_validate_json(json.dumps(reply)).model_dump(mode="json")
    assert shown == {"detail": None, **reply}


TOKENIZED = {"count": 3, "max_model_len": 2048, "tokens": [1, 2, 3], "token_strs": ["a", "b", "c"]}
PLACE = {"instance_id": "a", "location": "ram"}
TO = {"old_position": ["a", "ram"], "new_position": ["b", "ram"]}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/lookup", {}),
        ("/pin", PLACE),
        ("/unpin", PLACE),
        ("/clear", PLACE),
        ("/compress", {**PLACE, "method": "cachegen"}),
        ("/decompress", {**PLACE, "method": "cachegen"}),
        ("/move", TO),
    ],
)
@pytest.mark.parametrize("strings", [["a", "b", "c"], None, "absent"])
async def test_the_reply_of_vllms_tokenize_can_be_posted_as_it_is(
    client, controller, path, more, strings
):
    controller.end()
    body = {**TOKENIZED, "token_strs": strings, **more}
    if strings == "absent":
        del body["token_strs"]
    assert (await client.post(path, body))[0] == 200
    asked = controller.queries or controller.requests
    assert unpacked(asked[0].tokens) == [1, 2, 3]


def unpacked(tokens):
    return list(struct.unpack("<3I", tokens)) if isinstance(tokens, bytes) else list(tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", "a"), ("counts", 3), ("count", "3"), ("token_strs", [1]), ("max_model_len", -1)],
)
async def test_other_fields_and_other_types_stay_refused(client, field, value):
    status, _, message, hint = await client.error("/lookup", {**TOKENIZED, field: value})
    assert status == 422
    assert message.startswith(f"{field}")
    assert "token_strs" not in hint


async def test_an_unknown_model_is_404_and_lists_the_known_ones(client, controller):
    controller.failure = UnknownName("model", "lama", ["llama", "qwen"])
    assert await client.error("/lookup", {"tokens": [1], "model": "lama"}) == (
        404,
        "unknown_model",
        "unknown model 'lama'",
        "Known: llama, qwen",
    )
