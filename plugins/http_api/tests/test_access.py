"""Who may call, and which door may be opened."""

from __future__ import annotations

import socket

import pytest
from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions
from pydantic import ValidationError

from lmcache_kit.errors import ConfigError

LOOKUP = {"tokens": [1]}


async def send(client, authorization=None, path="/lookup"):
    headers = {} if authorization is None else {"Authorization": authorization}
    status, reply = await client.send("POST", path, json=LOOKUP, headers=headers)
    return status, reply.get("error", {}).get("code")


async def test_the_right_token_opens(serve):
    client = await serve(token="s3cret")
    assert await send(client, "Bearer s3cret") == (200, None)
    assert await send(client, "bearer  s3cret ") == (200, None)


async def test_no_token_is_401_and_says_what_to_send(serve):
    client = await serve(token="s3cret")
    status, code, _, hint = await client.error("/lookup", LOOKUP)
    assert (status, code) == (401, "token_missing")
    assert hint == "Send the header 'Authorization: Bearer <token>'"
    assert client.last.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("other", ["Basic s3cret", "Bearer", "Bearer ", "s3cret"])
async def test_anything_but_a_bearer_token_is_401(serve, other):
    assert await send(await serve(token="s3cret"), other) == (401, "token_missing")


@pytest.mark.parametrize("wrong", ["s3cre", "s3cret2", "S3CRET", "\u0444"])
async def test_a_wrong_token_is_403(serve, wrong):
    client = await serve(token="s3cret")
    assert await send(client, f"Bearer {wrong}") == (403, "token_wrong")


async def test_healthz_is_open_and_everything_else_asks_for_the_token(serve):
    client = await serve(token="s3cret")
    assert (await client.send("GET", "/healthz"))[0] == 200
    for path in ("/metrics", "/openapi.json"):
        assert (await client.send("GET", path))[0] == 401


async def test_strangers_do_not_learn_which_routes_there_are(serve):
    client = await serve(token="s3cret")
    assert await send(client, path="/nope") == (401, "token_missing")
    assert await send(client, path="/openapi.json") == (401, "token_missing")


async def test_without_a_token_web_pages_are_refused(client, controller):
    status, reply = await client.send(
        "POST", "/lookup", json=LOOKUP, headers={"Origin": "http://example.com"}
    )
    assert (status, reply["error"]["code"]) == (403, "cross_origin")
    assert controller.queries == []


async def test_with_the_token_web_pages_may_call(serve):
    client = await serve(token="s3cret")
    headers = {"Origin": "http://example.com", "Authorization": "Bearer s3cret"}
    assert (await client.send("POST", "/lookup", json=LOOKUP, headers=headers))[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_an_open_address_without_a_token_is_refused_with_the_remedy(controller, host):
    with pytest.raises(ConfigError, match=r"without a token.*LMCACHE_KIT_TOKEN.*--insecure"):
        HttpFrontend(controller, HttpOptions(host=host))


@pytest.mark.parametrize("more", [{"token": "s3cret"}, {"insecure": True}])
def test_an_open_address_with_a_token_or_on_purpose_is_accepted(controller, more):
    assert HttpFrontend(controller, HttpOptions(host="0.0.0.0", **more)).endpoints == ()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_needs_no_token(controller, host):
    assert HttpFrontend(controller, HttpOptions(host=host)).endpoints == ()


@pytest.mark.parametrize("token", ["", "two words", "new\nline", "\u0444"])
def test_a_token_that_no_header_can_carry_is_refused(token):
    with pytest.raises(ValidationError, match="printable ASCII without spaces"):
        HttpOptions(token=token)


def test_the_token_is_not_shown_with_the_options():
    assert "s3cret" not in repr(HttpOptions(token="s3cret"))


async def lookup_for(client, host):
    status, reply = await client.send("POST", "/lookup", json=LOOKUP, headers={"Host": host})
    return status, reply.get("error", {}).get("code")


REFUSED = (403, "foreign_host")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost.:9000",
        "127.0.0.1:9000",
        "[::1]:9000",
        "[0:0::1]",
        "10.0.0.7",
        "app.localhost:9000",
        socket.gethostname(),
    ],
)
async def test_own_names_and_addresses_are_answered(client, host):
    assert await lookup_for(client, host) == (200, None)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:9000",
        "127.0.0.1.evil.example",
        "localhost.evil.example:9000",
        "evil-localhost",
        "[evil]:9000",
        "10.0.0.7.:x",
        "x" * 5000,
    ],
)
async def test_a_name_of_another_server_is_refused(client, controller, host):
    assert await lookup_for(client, host) == REFUSED
    assert controller.queries == []


async def test_the_refusal_says_which_name_and_how_to_allow_it(client):
    status, reply = await client.send("GET", "/metrics", headers={"Host": "cache.example:9000"})
    assert status == 403
    assert reply["error"]["message"] == "this server is not called 'cache.example:9000'"
    assert "http.allowed_hosts=NAME" in reply["error"]["hint"]
    assert "localhost" in reply["error"]["hint"]


async def test_a_health_probe_may_use_any_name(client):
    assert (await client.send("GET", "/healthz", headers={"Host": "probe.example"}))[0] == 200


async def test_further_names_can_be_allowed(serve):
    client = await serve(allowed_hosts="cache.example, *.svc")
    assert await lookup_for(client, "cache.example:9000") == (200, None)
    assert await lookup_for(client, "a.b.svc") == (200, None)
    assert await lookup_for(client, "localhost") == (200, None)
    assert await lookup_for(client, "svc") == REFUSED
    assert await lookup_for(client, "www.cache.example") == REFUSED
    assert await lookup_for(await serve(allowed_hosts="*"), "evil.example") == (200, None)


async def test_with_a_token_any_name_will_do_unless_names_are_given(serve):
    """Whoever binds to all addresses and asks for a token is called by names of a network."""
    headers = {"Authorization": "Bearer s3cret", "Host": "cache.example"}
    for options, expected in (({}, 200), ({"allowed_hosts": "other.example"}, 403)):
        client = await serve(token="s3cret", **options)
        assert (await client.send("POST", "/lookup", json=LOOKUP, headers=headers))[0] == expected


@pytest.mark.parametrize("hosts", ["a b", "a/b", "http://a", "*a", ("",)])
def test_a_name_that_no_host_can_have_is_refused(hosts):
    with pytest.raises(ValidationError, match="allowed_hosts"):
        HttpOptions(allowed_hosts=hosts)
