"""What a client does wrong has a status, a code and a message that names it; never a 500."""

from __future__ import annotations

import gzip

import pytest

PLACE = {"instance_id": "a", "location": "ram"}
BAD_TOKENS = [
    ([1, -1], "tokens[1]: input should be greater than or equal to 0, got -1"),
    ([2**32], "tokens[0]: input should be less than or equal to 4294967295, got 4294967296"),
    ([1, True], "tokens[1]: input should be a valid integer, got true"),
    ([1, 2.0], "tokens[1]: input should be a valid integer, got 2.0"),
    ([1, "2"], "tokens[1]: input should be a valid integer, got '2'"),
    ([None], "tokens[0]: input should be a valid integer, got null"),
    ([[1]], "tokens[0]: input should be a valid integer, got an array"),
    ([{"a": 1}], "tokens[0]: input should be a valid integer, got an object"),
    ("1 2", "tokens: input should be a valid array"),
    (None, "tokens: input should be a valid array"),
    (7, "tokens: input should be a valid array"),
]


@pytest.mark.parametrize(("tokens", "told"), BAD_TOKENS)
async def test_tokens_that_are_none_are_named(client, tokens, told):
    status, code, message, _ = await client.error("/lookup", {"tokens": tokens})
    assert (status, code, message) == (422, "invalid_request", told)


async def test_a_huge_number_is_refused_without_being_shown(client):
    status, _, message, _ = await client.error("/lookup", b'{"tokens": [%s]}' % (b"9" * 400))
    assert (status, message) == (
        422,
        "tokens[0]: input should be less than or equal to 4294967295, got a huge number",
    )


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
async def test_numbers_that_are_none_are_refused(client, number):
    status, _, message, _ = await client.error("/lookup", b'{"tokens": [%s]}' % number)
    assert status == 422
    assert message.startswith("tokens[0]")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/lookup", {}, "tokens"),
        ("/health", {}, "instance_id"),
        ("/query_worker_info", {}, "instance_id"),
        ("/query_instance", {}, "ip"),
        ("/pin", {"instance_id": "a", "location": "ram"}, "tokens"),
        ("/pin", {"instance_id": "a", "tokens": [1]}, "location"),
        ("/compress", {"instance_id": "a", "location": "ram"}, "method"),
        ("/check_finish", {}, "event_id"),
    ],
)
async def test_a_missing_field_is_named(client, path, body, field):
    status, code, message, hint = await client.error(path, body)
    assert (status, code) == (422, "invalid_request")
    assert message == f"{field}: required, and missing"
    assert field in hint


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/lookup", {"tokens": [1], "detail": 1}, "detail: input should be a valid boolean, got 1"),
        ("/lookup", {"tokens": [1], "model": 7}, "model: input should be a valid string, got 7"),
        ("/health", {"instance_id": ""}, "instance_id: string should have at least 1 character"),
        ("/health", {"instance_id": "x" * 257}, "instance_id: string should have at most 256"),
        (
            "/query_worker_info",
            {"instance_id": "a", "worker_ids": [-1]},
            "worker_ids[0]: input should be greater than or equal to 0, got -1",
        ),
        (
            "/pin",
            {**PLACE, "tokens": []},
            "tokens: an empty list names no tokens",
        ),
        ("/clear", {**PLACE, "tokens": []}, "tokens: an empty list names no tokens"),
        ("/clear", {**PLACE, "force": 1}, "force: input should be a valid boolean, got 1"),
        ("/pin", {**PLACE, "tokens": [1], "ttl_s": 0}, "ttl_s: input should be greater than 0"),
        ("/pin", {**PLACE, "tokens": [1], "ttl_s": True}, "ttl_s: input should be a valid number"),
        ("/unpin", PLACE, "the body: tokens or pin_id is required"),
        ("/clear", {**PLACE, "deadline_s": -1}, "deadline_s: input should be greater than 0"),
        ("/query_instance", {"ip": ["a"]}, "ip: input should be a valid string, got an array"),
    ],
)
async def test_a_field_of_the_wrong_type_is_named(client, path, body, told):
    status, _, message, _ = await client.error(path, body)
    assert status == 422
    assert message.startswith(told)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("limit=0", "limit: input should be greater than or equal to 1"),
        ("limit=x", "limit: input should be a valid integer, unable to parse"),
        ("state=over", "state: input should be 'queued', 'running'"),
        ("operation=fly", "operation: input should be 'pin'"),
        ("instance_id=", "instance_id: string should have at least 1 character"),
        ("sate=done", "sate: unknown field"),
        ("limit=1&limit=2", "limit: stands twice"),
    ],
)
async def test_a_wrong_parameter_is_named(client, query, told):
    status, reply = await client.send("GET", f"/events?{query}")
    assert (status, reply["error"]["code"]) == (422, "invalid_request")
    assert reply["error"]["message"].startswith(told)


async def test_a_name_in_the_path_cannot_stand_in_the_query_as_well(client):
    status, reply = await client.send("GET", "/events/e1?event_id=e2")
    assert (status, reply["error"]["message"]) == (422, "event_id: stands twice")


@pytest.mark.parametrize("path", ["/events/", "/events/e1/", "/events//cancel", "/events/a/b/c"])
async def test_a_path_with_a_name_is_exact_too(client, path):
    status, reply = await client.send("GET", path)
    assert (status, reply["error"]["code"]) == (404, "unknown_route")


async def test_an_unknown_field_is_refused_with_the_nearest_name(client):
    status, _, message, hint = await client.error("/lookup", {"tokens": [1], "cache_sald": "s"})
    assert (status, message) == (422, "cache_sald: unknown field")
    assert hint.startswith("Did you mean 'cache_salt'? Fields: tokens, model")


async def test_too_many_tokens_are_refused_with_the_limit(serve):
    client = await serve(max_tokens=3)
    assert (await client.post("/lookup", {"tokens": [1, 2, 3]}))[0] == 200
    status, _, message, _ = await client.error("/lookup", {"tokens": [1, 2, 3, 4]})
    assert (status, message) == (422, "tokens: 4 tokens are more than the 3 allowed")


@pytest.mark.parametrize(
    "body",
    [
        b"tokens=1",
        b"{",
        b'{"tokens": [1}',
        b'{"tokens": [1]} x',
        b'{"tokens": [01]}',
        b'{"tokens": [' + b"9" * 5000 + b"]}",
        b"[" * 100_000,
        b'{"tokens":' * 5000,
        b"\xff\xfe",
        b'{"\xff": 1}',
        b'{"tokens": [1], "model": "\xc3"}',
        b'{"tokens": [1], "model": "\\ud800"}',
        b"\x00",
        b'{"tokens": [1\x00]}',
        b"\xef\xbb\xbf{}",
        b" ",
    ],
)
async def test_what_is_not_json_is_400(client, body):
    status, code, _, hint = await client.error("/lookup", body)
    assert (status, code) == (400, "invalid_json")
    assert hint == "Send one JSON object in UTF-8"


@pytest.mark.parametrize("body", [b"[1]", b"1", b'"x"', b"null", b"true"])
async def test_json_that_is_no_object_is_422(client, body):
    status, _, message, _ = await client.error("/lookup", body)
    assert (status, message) == (422, "the body: must be a JSON object")


async def test_of_a_key_that_stands_twice_the_last_counts(client, controller):
    await client.post_bytes("/lookup", b'{"tokens": [1], "tokens": [2]}')
    assert list(controller.queries[0].tokens) == [2]


async def test_a_missing_body_is_told_from_a_wrong_one(client):
    status, code, message, hint = await client.error("/lookup", b"")
    assert (status, code, message) == (400, "missing_body", "the request has no body")
    assert "tokens" in hint


async def test_query_parameters_are_not_silently_ignored(client):
    status, _, message, _ = await client.error("/lookup?detail=true", {"tokens": [1]})
    assert (status, message) == (422, "query parameters are not read here")


async def test_a_body_over_the_limit_is_413_with_the_limit(serve):
    client = await serve(max_body_bytes=100)
    status, code, message, _ = await client.error("/lookup", b"x" * 101)
    assert (status, code) == (413, "body_too_large")
    assert message == "the body is larger than the 100 bytes allowed"


async def test_a_body_over_the_limit_is_413_when_its_length_is_not_told(serve):
    client = await serve(max_body_bytes=100)

    async def pieces():
        for _ in range(10):
            yield b"x" * 50

    status, reply = await client.send("POST", "/lookup", data=pieces())
    assert (status, reply["error"]["code"]) == (413, "body_too_large")


async def test_a_small_body_that_unpacks_to_a_large_one_is_413(serve):
    client = await serve(max_body_bytes=10_000)
    status, reply = await client.send(
        "POST",
        "/lookup",
        data=gzip.compress(b" " * 5_000_000),
        headers={"Content-Encoding": "gzip"},
    )
    assert (status, reply["error"]["code"]) == (413, "body_too_large")


async def test_a_body_that_does_not_unpack_is_400(client):
    status, reply = await client.send(
        "POST", "/lookup", data=b"not gzip", headers={"Content-Encoding": "gzip"}
    )
    assert (status, reply["error"]["code"]) == (400, "bad_body")


async def test_an_unknown_route_lists_the_known_ones(client):
    status, code, message, hint = await client.error("/lookups", {"tokens": [1]})
    assert (status, code, message) == (404, "unknown_route", "no route '/lookups'")
    assert "POST /lookup, " in hint


@pytest.mark.parametrize("path", ["/lookup/", "//lookup", "/%ff", "/" + "x" * 3000, "/lookup%00"])
async def test_routes_are_exact_and_long_paths_are_not_sent_back_whole(client, path):
    status, code, message, _ = await client.error(path, {})
    assert (status, code) == (404, "unknown_route")
    assert len(message) < 300


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/lookup", "POST"),
        ("OPTIONS", "/lookup", "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("DELETE", "/events/e1", "GET, HEAD"),
        ("GET", "/events/e1/cancel", "POST"),
    ],
)
async def test_a_wrong_method_is_405_with_allow(client, method, path, allowed):
    status, reply = await client.send(method, path)
    assert (status, reply["error"]["code"]) == (405, "method_not_allowed")
    assert client.last.headers["Allow"] == allowed
