"""Whatever the body is, the answer is no 5xx and errors have the one shape."""

from __future__ import annotations

import http.client
import json
import urllib.parse

from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_kit_http_api.routes import ROUTES

PATHS = [route.path for route in ROUTES if route.request and not route.in_url]
GET_PATHS = ["/events", "/pins", "/events/e1"]
FIELDS = sorted({name for route in ROUTES if route.request for name in route.request.model_fields})

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
objects = st.dictionaries(
    st.sampled_from(FIELDS) | st.text(max_size=5),
    values | st.lists(st.integers(0, 2**32 - 1)),
    max_size=6,
)


def send(port: int, path: str, body: bytes, method: str = "POST") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def check(status: int, answer: bytes) -> None:
    assert status < 500, answer
    reply = json.loads(answer)
    if status != 200:
        assert set(reply["error"]) == {"code", "message", "hint"}
        assert all(isinstance(value, str) for value in reply["error"].values())


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), body=objects)
def test_any_json_object(served_port, path, body):
    check(*send(served_port, path, json.dumps(body).encode()))


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
def test_any_bytes(served_port, path, body):
    check(*send(served_port, path, body))


@settings(max_examples=100, deadline=None)
@given(
    path=st.sampled_from(PATHS),
    cut=st.integers(0, 40),
    extra=st.binary(max_size=3),
)
def test_a_good_body_that_was_damaged(served_port, path, cut, extra):
    good = b'{"tokens": [1, 2, 3], "cache_salt": "s"}'
    check(*send(served_port, path, good[:cut] + extra + good[cut:]))


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=64))
def test_any_tokens_are_accepted(served_port, tokens):
    status, answer = send(served_port, "/lookup", json.dumps({"tokens": tokens}).encode())
    assert status == 200
    assert json.loads(answer)["lmcache_default_instance"] == ["LocalCPUBackend", 1]


@settings(max_examples=100, deadline=None)
@given(
    path=st.sampled_from(GET_PATHS),
    query=st.lists(st.tuples(st.sampled_from(FIELDS) | st.text(max_size=5), st.text(max_size=9))),
)
def test_any_query(served_port, path, query):
    check(*send(served_port, f"{path}?{urllib.parse.urlencode(query)}", b"", "GET"))
