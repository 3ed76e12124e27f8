"""What a server keeps: its room, what others put there, and what it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache_kit_valkey_backend import backend as module

from plugins.valkey_backend.tests.calls import KEY, OTHER, Open, Serve, got, put

if TYPE_CHECKING:
    import pytest

    from plugins.valkey_backend.tests.conftest import Served


def test_a_server_that_is_full_and_evicts_nothing_refuses(serve: Serve, open_backend: Open) -> None:
    server = serve("--maxmemory", "20mb", "--maxmemory-policy", "noeviction")
    backend = open_backend(server.options())
    answers = [put(backend, bytes([n] * 16), bytes(2_000_000)) for n in range(15)]
    assert answers[0] is True
    assert answers[-1] is False
    assert got(backend, bytes(16)) == bytes(2_000_000)
    assert backend.usage().capacity_bytes == 20 << 20
    backend.remove([bytes([n] * 16) for n in range(15)])
    assert put(backend)


def test_what_the_server_evicts_is_a_miss(serve: Serve, open_backend: Open) -> None:
    server = serve("--maxmemory", "20mb", "--maxmemory-policy", "allkeys-lru")
    backend = open_backend(server.options())
    keys = [bytes([n] * 16) for n in range(30)]
    assert all(put(backend, key, bytes(2_000_000)) for key in keys)
    there = backend.contains(keys)
    assert not all(there)
    assert [got(backend, key) is not None for key in keys] == there


def test_a_value_over_the_limit_is_refused_and_not_sent(
    server: Served, open_backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_DATA_BYTES", 1000)
    backend = open_backend(server.options())
    assert put(backend, KEY, bytes(1000)) is True
    assert put(backend, KEY, bytes(1001)) is False
    assert got(backend) == bytes(1000)


def test_blobs_expire_unless_they_are_read(server: Served, open_backend: Open) -> None:
    backend = open_backend(server.options(ttl_s=100))
    put(backend)
    name = b"lmcache_kit:1:" + KEY.hex().encode()
    with server.client() as client:
        assert 0 < client.ttl(name) <= 100
        client.expire(name, 5)
        got(backend)
        assert client.ttl(name) > 50
    with server.client() as client:
        client.expire(name, 0)
    assert got(backend) is None


def test_what_is_no_blob_is_no_blob(server: Served, open_backend: Open) -> None:
    backend = open_backend(server.options())
    name = b"lmcache_kit:1:" + KEY.hex().encode()
    with server.client() as client:
        for foreign in (("SET", name, "text"), ("HSET", name, "m", "only"), ("LPUSH", name, "x")):
            client.unlink(name)
            client.execute_command(*foreign)
            client.set(b"lmcache_kit:1:" + b"z" * 32, "no key")
            client.set("lmcache_kit:0:" + KEY.hex(), "another format")
            assert got(backend) is None
            assert {each.key for each in backend.scan()} <= {KEY}
            assert put(backend)
            assert got(backend) == b"data"
            assert client.get("lmcache_kit:0:" + KEY.hex()) == b"another format"


def test_a_meta_that_is_too_long_to_be_ours_is_not_read(server: Served, open_backend: Open) -> None:
    backend = open_backend(server.options())
    put(backend, OTHER)
    with server.client() as client:
        foreign = {"m": bytes((1 << 20) + 1), "d": "data"}
        client.hset("lmcache_kit:1:" + KEY.hex(), mapping=foreign)
    assert got(backend) is None
    assert [each.key for each in backend.scan()] == [OTHER]


def test_prefixes_keep_stores_apart(server: Served, open_backend: Open) -> None:
    one, other = (open_backend(server.options(prefix=each)) for each in ("a*:", "ab:"))
    put(other)
    assert got(one) is None
    assert list(one.scan()) == []
    put(one, OTHER)
    assert [each.key for each in one.scan()] == [OTHER]


def test_many_keys_are_one_round_trip(server: Served, open_backend: Open) -> None:
    backend = open_backend(server.options())
    put(backend)
    with server.client() as client:
        before = client.info("stats")["total_reads_processed"]
        backend.contains([number.to_bytes(16) for number in range(500)])
        reads = client.info("stats")["total_reads_processed"] - before
    assert reads < 20


def test_commands_are_those_that_are_expected(server: Served, open_backend: Open) -> None:
    """Never one that looks at all keys of a server at once."""
    backend = open_backend(server.options())
    with server.client() as client:
        client.config_resetstat()
        put(backend)
        got(backend)
        backend.contains([KEY])
        list(backend.scan())
        backend.remove([KEY])
        used = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
    expected = {"hset", "hmget", "hexists", "scan", "hget", "hstrlen", "unlink"}
    greetings = {"info", "config", "client", "select"}
    assert {name for name in used if name.partition("|")[0] not in greetings} == expected
