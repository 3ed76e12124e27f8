"""Starting, stopping, and what reaches the socket without being a good request."""

from __future__ import annotations

import asyncio
import errno
import json
import socket

import aiohttp
import pytest
from lmcache_kit_http_api.frontend import HttpFrontend
from lmcache_kit_http_api.options import HttpOptions

BODY = b'{"tokens": [1]}'


async def exchange(client, *sent: bytes) -> bytes:
    """Send pieces on a raw connection and read until the server closes it."""
    port = int(client.base.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in sent:
        writer.write(piece)
        await writer.drain()
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def error_in(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /lookup HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /lookup HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"POST /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_answered_in_the_shape_of_errors(client, sent):
    assert error_in(await exchange(client, sent)) == (400, "bad_request")


async def test_after_what_is_not_http_the_next_client_is_served(client):
    await exchange(client, b"GARBAGE\r\n\r\n")
    assert (await client.post("/lookup", {"tokens": [1]}))[0] == 200


async def test_a_body_that_stops_half_way_is_408(serve):
    client = await serve(request_timeout_s=0.1)
    sent = b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
    assert error_in(await exchange(client, sent)) == (408, "body_timeout")


async def test_a_client_that_waits_for_a_word_is_told_to_go_on(client):
    head = (
        b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    )
    answer = await exchange(client, head, BODY)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


async def test_a_client_that_waits_for_a_word_with_too_much_is_refused_at_once(serve):
    client = await serve(max_body_bytes=10)
    head = (
        b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Expect: 100-continue\r\nContent-Length: 11\r\n\r\n"
    )
    assert error_in(await exchange(client, head)) == (413, "body_too_large")


async def test_another_expectation_is_417(client):
    head = b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: more\r\n"
    answer = await exchange(client, head + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
    assert error_in(answer) == (417, "unknown_expectation")


async def test_a_token_that_is_no_text_is_403(serve):
    client = await serve(token="s3cret")
    head = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = await exchange(client, head + b"Authorization: Bearer \xff\xfe\r\n\r\n")
    assert error_in(answer) == (403, "token_wrong")


async def test_a_client_that_goes_away_does_no_harm(client):
    port = int(client.base.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()
    assert (await client.post("/lookup", {"tokens": [1]}))[0] == 200


async def test_one_connection_serves_many_requests(client):
    head = b"POST /lookup HTTP/1.1\r\nHost: localhost\r\n"
    one = head + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    last = one.replace(b"Host: localhost", b"Host: localhost\r\nConnection: close")
    assert (await exchange(client, one, one + last)).count(b"HTTP/1.1 200 OK") == 3


async def test_the_server_does_not_tell_its_versions(client):
    await client.send("GET", "/healthz")
    assert client.last.headers["Server"] == "lmcache-kit"


async def test_a_taken_port_is_an_oserror_that_names_the_address(controller):
    first = HttpFrontend(controller, HttpOptions(port=0))
    await first.start()
    port = int(first.endpoints[0].rpartition(":")[2])
    second = HttpFrontend(controller, HttpOptions(port=port))
    with pytest.raises(OSError, match=f"127.0.0.1:{port}") as raised:
        await second.start()
    assert raised.value.errno == errno.EADDRINUSE
    await second.stop()
    await first.stop()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
async def test_localhost_is_served_on_both_families(controller):
    frontend = HttpFrontend(controller, HttpOptions(port=0))
    await frontend.start()
    port = int(frontend.endpoints[0].rpartition(":")[2])
    async with aiohttp.ClientSession() as session:
        for host in ("127.0.0.1", "[::1]"):
            async with session.get(f"http://{host}:{port}/healthz") as response:
                assert response.status == 200
    await frontend.stop()


async def test_a_request_in_flight_is_answered_before_it_stops(controller):
    controller.matches, controller.wait_s = {"a": []}, 0.2
    frontend = HttpFrontend(controller, HttpOptions(port=0, shutdown_grace_s=5))
    await frontend.start()
    async with aiohttp.ClientSession(frontend.endpoints[0]) as session:
        asked = asyncio.create_task(session.post("/health", json={"instance_id": "a"}))
        await controller.asked.wait()
        await frontend.stop()
        response = await asked
        assert response.status == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get("/healthz")


async def test_a_request_that_outlasts_the_grace_does_not_hold_it_up(controller):
    controller.matches, controller.wait_s = {"a": []}, 3600
    frontend = HttpFrontend(controller, HttpOptions(port=0, shutdown_grace_s=0.05))
    await frontend.start()
    async with aiohttp.ClientSession(frontend.endpoints[0]) as session:
        asked = asyncio.create_task(session.post("/health", json={"instance_id": "a"}))
        await controller.asked.wait()
        async with asyncio.timeout(10):
            await frontend.stop()
        with pytest.raises(aiohttp.ClientConnectionError):
            await asked


async def test_an_idle_connection_does_not_hold_up_stopping(serve, controller):
    frontend = HttpFrontend(controller, HttpOptions(port=0, shutdown_grace_s=3600))
    await frontend.start()
    async with aiohttp.ClientSession(frontend.endpoints[0]) as session:
        await session.get("/healthz")
        async with asyncio.timeout(10):
            await frontend.stop()


WHOLE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        ([], 0),
        ([WHOLE[:-2]], 0),
        ([b"G"], 0),
        ([WHOLE], 1),
        ([WHOLE, WHOLE[:-2]], 1),
    ],
    ids=["silent", "half a head", "one byte", "after a request", "half a second head"],
)
async def test_a_connection_without_a_whole_head_ends(serve, sent, answers):
    client = await serve(idle_timeout_s=0.1)
    assert (await exchange(client, *sent)).count(b"HTTP/1.1 200 OK") == answers


async def test_stopping_twice_and_before_starting_is_fine(controller):
    frontend = HttpFrontend(controller, HttpOptions(port=0))
    await frontend.stop()
    await frontend.start()
    await frontend.stop()
    await frontend.stop()
