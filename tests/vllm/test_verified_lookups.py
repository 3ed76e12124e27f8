"""Lookups that promise only what is whole."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_kit.keys import pack_tokens
from lmcache_kit.vllm.verified_lookups import VerifiedLookups
from tests.support.waiting import eventually
from tests.vllm.fakes import CHUNK, NAMESPACE, FakeClient

PROMPT = list(range(100, 124))  # three chunks


@pytest.fixture
def client() -> FakeClient:
    client = FakeClient()
    client.store(PROMPT)
    return client


def looked_up(client: Any) -> Any:
    lookups = VerifiedLookups(client)
    lookup = lookups.begin_lookup(NAMESPACE.digest, pack_tokens(PROMPT), CHUNK)
    return eventually(lambda: lookup.poll(0.01))


def damage(client: FakeClient, *chunks: int) -> list[bytes]:
    for index in chunks:
        client.bytes[list(client.chunks.values())[index][1].offset] ^= 0xFF
    return [list(client.chunks)[index] for index in chunks]


def test_what_is_whole_is_promised(client: FakeClient) -> None:
    assert looked_up(client).tokens == len(PROMPT)
    assert client.held() == 1


def test_what_comes_before_damage_is_promised_and_all_damage_is_reported(
    client: FakeClient,
) -> None:
    keys = damage(client, 1, 2)
    found = looked_up(client)
    assert (found.tokens, bool(found.lease)) == (CHUNK, True)
    assert client.corrupt == keys


def test_nothing_is_leased_where_the_first_chunk_is_damaged(client: FakeClient) -> None:
    damage(client, 0)
    found = looked_up(client)
    assert (found.tokens, found.lease) == (0, 0)
    assert client.held() == 0


def test_memory_that_is_no_longer_mapped_is_a_miss(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "memory", lambda incarnation: None)
    assert looked_up(client).tokens == 0


def test_a_miss_is_answered_at_once() -> None:
    assert looked_up(FakeClient()).lease == 0


def test_what_is_abandoned_is_given_back(client: FakeClient) -> None:
    for polls in (0, 1):
        lookups = VerifiedLookups(client)  # type: ignore[arg-type]
        lookup = lookups.begin_lookup(NAMESPACE.digest, pack_tokens(PROMPT), CHUNK)
        for _ in range(polls):
            lookup.poll()
        lookup.abandon()
        lookups.close()
        eventually(lambda: client.held() == 0)
