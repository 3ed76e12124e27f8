"""Two caches on one server: what one has stored the other finds, and neither waits for a server
that does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.cache.tiers import circuit_breaker
from lmcache_kit.plugins import Plugins
from lmcache_kit.service.build import open_backend
from tests.peer.conftest import Place
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from plugins.valkey_backend.tests.conftest import Served

MakePlace = Callable[..., Place]
TOKENS = range(200)


@pytest.fixture
def place() -> Iterator[Callable[[Served], Place]]:
    """A cache over a server, as a configuration makes it."""
    made: list[Place] = []

    def make(server: Served) -> Place:
        options = {"url": f"redis://127.0.0.1:{server.port}", "timeout_ms": 300}
        backend = open_backend(Plugins.load(), "ValkeyBackend", options)
        made.append(Place(f"place-{len(made)}", stores=[backend]))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_one_stores_the_other_finds(
    serve: Callable[..., Served], place: Callable[[Served], Place]
) -> None:
    server = serve()
    one, other = place(server), place(server)
    one.store(TOKENS)
    one.settle()
    assert other.hit(TOKENS) == len(TOKENS)
    assert other.stats()["promoted_chunks_total"] == 13
    other.settle()
    assert other.tiers[0].stats()["written_chunks_total"] == 0


def test_a_server_that_is_gone_is_a_miss_and_costs_the_next_lookup_nothing(
    serve: Callable[..., Served], place: Callable[[Served], Place]
) -> None:
    server = serve()
    one, other = place(server), place(server)
    one.store(TOKENS)
    one.settle()
    with server.frozen():
        assert other.hit(TOKENS) == 0
        assert other.tiers[0].store.resting
        failures = other.tiers[0].stats()["failures_total"]
        assert other.hit(TOKENS) == 0
        other.store(range(1000, 1100))
        assert other.hit(range(1000, 1100)) == 100
        assert other.tiers[0].stats()["failures_total"] == failures


def test_a_cache_starts_without_its_server_and_uses_it_once_it_is_there(
    serve: Callable[..., Served],
    place: Callable[[Served], Place],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(circuit_breaker, "FIRST_REST_S", 0.001)
    monkeypatch.setattr(circuit_breaker, "LONGEST_REST_S", 0.001)
    server = serve()
    server.kill()
    one = place(server)
    one.store(TOKENS)
    one.settle()
    assert one.hit(TOKENS) == len(TOKENS)
    server.start()
    tier = one.tiers[0]
    eventually(lambda: not tier.store.resting)
    one.store(range(5000, 5100))
    one.settle()
    assert tier.stats()["written_chunks_total"] == 7
