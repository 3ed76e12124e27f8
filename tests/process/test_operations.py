"""Operations carried out on an engine with real memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from lmcache_kit_cpu_backend.backend import LocalCPUBackend
from xxhash import xxh3_64_intdigest

from lmcache_kit.cache.engine import CacheEngine
from lmcache_kit.cache.index.entries import RankLayout
from lmcache_kit.cache.index.policies import LRU
from lmcache_kit.cache.namespaces import NamespaceRegistry
from lmcache_kit.cache.records import StoreItem
from lmcache_kit.errors import InvalidQuery, PluginBroken, UnknownName
from lmcache_kit.interfaces import Codec, Region
from lmcache_kit.interfaces.operations import (
    Clear,
    Compress,
    Decompress,
    ListPins,
    OperationRequest,
    OperationStatus,
    Pin,
    Scope,
    Unpin,
)
from lmcache_kit.keys import Namespace, chain, pack_tokens
from lmcache_kit.layout import KVLayout
from lmcache_kit.service import chunk_operation
from lmcache_kit.service.codecs import Codecs
from lmcache_kit.service.operations import EngineExecutor
from tests.cache.codecs import Zip
from tests.control.fakes import RecordingListener

LAYOUT = KVLayout("float32", 2, 1, 16)
"""256 bytes a token: 4096 a chunk, one page."""
CHUNK = 16
BASE = Namespace("acme/model", LAYOUT, CHUNK)
OTHER = Namespace("acme/other", LAYOUT, CHUNK)
PLACE = "LocalCPUBackend"


class FakeCodecs(Codecs):
    """One codec, made as a test says."""

    def __init__(self) -> None:
        self.codec = Zip()
        self.broken: Exception | None = None

    @property
    def names(self) -> list[str]:
        return ["zip"]

    def get(self, name: str) -> Codec:
        if self.broken:
            raise self.broken
        return self.codec


class Started(RecordingListener):
    """An operation that was started, and its course."""

    def __init__(
        self, executor: EngineExecutor, request: OperationRequest, deadline_s: float
    ) -> None:
        super().__init__()
        self._running = executor.start(request, deadline_s=deadline_s, listener=self)

    def cancel(self) -> None:
        assert self._running is not None, "it cannot be stopped"
        self._running.cancel()


class Place:
    """A cache of 64 chunks, and its executor."""

    def __init__(self) -> None:
        self.memory = LocalCPUBackend(64 * 4096)
        self.engine = CacheEngine(self.memory, LRU(), location=PLACE)
        self.codecs = FakeCodecs()
        self.namespaces = NamespaceRegistry()
        self.namespaces.register(BASE)
        self.executor = EngineExecutor(self.engine, self.codecs, namespaces=self.namespaces)

    def store(self, tokens: Sequence[int], space: Namespace = BASE) -> None:
        packed = pack_tokens(tokens)
        items = [
            StoreItem(
                link.parent,
                packed[link.start * 4 : link.end * 4],
                LAYOUT.payload_bytes(link.end - link.start),
                link.start,
            )
            for link in chain(space.digest, packed, CHUNK)
        ]
        grants = self.engine.allocate(space.digest, 0, 1, CHUNK, items, "w", RankLayout(LAYOUT))
        written = []
        for item, grant in zip(items, grants, strict=True):
            data = bytes(range(16)) * (item.nbytes // 16)
            self.memory.view(Region(grant.offset, item.nbytes))[:] = data
            written.append((grant.ticket, xxh3_64_intdigest(data)))
        assert self.engine.commit(written, "w") == len(items)

    def hit(self, tokens: Sequence[int], space: Namespace = BASE) -> int:
        match = self.engine.lookup(space.digest, pack_tokens(tokens), CHUNK, 1, "r", 20)
        self.engine.release(match.lease, None)
        return match.chunks[-1].end if match.chunks else 0

    def begin(self, request: OperationRequest, deadline_s: float = 60) -> Started:
        return Started(self.executor, request, deadline_s)

    def do(self, request: OperationRequest) -> OperationStatus:
        return self.begin(request).wait()

    def close(self) -> None:
        self.codecs.codec.gate.set()
        self.executor.close()
        self.engine.close()


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def pin(tokens: Sequence[int] | None, pin_id: str = "p", **more: object) -> Pin:
    packed = None if tokens is None else pack_tokens(tokens)
    return Pin(location=PLACE, tokens=packed, pin_id=pin_id, **more)  # type: ignore[arg-type]


def compress(tokens: Sequence[int] | None = None, **more: object) -> Compress:
    packed = None if tokens is None else pack_tokens(tokens)
    return Compress(location=PLACE, tokens=packed, method="zip", **more)  # type: ignore[arg-type]


def decompress(tokens: Sequence[int] | None = None) -> Decompress:
    packed = None if tokens is None else pack_tokens(tokens)
    return Decompress(location=PLACE, tokens=packed, method="zip")


# What cannot be done is said at once.


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Clear(location="Disk"), "unknown location 'Disk'. Known: LocalCPUBackend"),
        (Compress(location=PLACE, method="gz"), "unknown method 'gz'. Known: zip"),
        (Decompress(location=PLACE, method=""), "unknown method ''. Known: zip"),
        (Clear(location=PLACE, model="x"), "unknown model 'x'. Known: acme/model"),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_those_that_are(
    place: Place, wanted: OperationRequest, message: str
) -> None:
    with pytest.raises(UnknownName) as caught:
        place.begin(wanted)
    assert str(caught.value) == message


def test_tokens_that_are_no_tokens_are_refused(place: Place) -> None:
    with pytest.raises(InvalidQuery, match="3 bytes; packed tokens have 4 bytes each"):
        place.begin(Pin(location=PLACE, tokens=b"abc", pin_id="p"))


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan")])
def test_a_pin_for_no_time_is_refused(place: Place, ttl_s: float) -> None:
    with pytest.raises(InvalidQuery, match="it must be over 0"):
        place.begin(pin([1], ttl_s=ttl_s))


# Pins and clearing.


def test_a_pin_says_what_it_really_holds(place: Place) -> None:
    place.store(range(40))
    running = place.begin(pin(range(100), owner="ann", ttl_s=60))
    assert running.scope == Scope(40, 3)
    assert running.wait().state == "done"
    assert running.wait().tokens == 40
    [info] = running.wait().pins
    assert (info.pin_id, info.owner, info.tokens, info.location) == ("p", "ann", 40, PLACE)
    assert place.do(ListPins(location=PLACE)).pins[0].nbytes == 40 * 256


def test_a_pin_over_the_budget_is_partial_and_says_so(place: Place) -> None:
    place.store(range(16 * 40))
    status = place.do(pin(range(16 * 40)))
    assert (status.state, status.tokens) == ("partial", 16 * 32)
    assert status.message == (
        "pinned 512 of 640 tokens: all pins together may hold 131072 bytes (max_pinned_share)"
    )


def test_a_pin_of_what_is_not_stored_pins_nothing_and_says_so(place: Place) -> None:
    status = place.do(pin([1, 2, 3]))
    assert (status.state, status.tokens, status.pins) == ("done", 0, ())
    assert status.message == "nothing of this is stored"


def test_a_pin_without_a_time_takes_the_configured_one() -> None:
    place = Place()
    place.executor = EngineExecutor(
        place.engine, place.codecs, namespaces=place.namespaces, pin_ttl_s=300
    )
    place.store(range(16))
    place.do(pin(None))
    place.do(pin(None, "q", ttl_s=5))
    first, second = place.do(ListPins(location=PLACE)).pins
    assert first.expires_in_s == pytest.approx(300, abs=20)
    assert second.expires_in_s == pytest.approx(5, abs=5)
    place.close()


def test_pins_end_by_id_and_by_tokens(place: Place) -> None:
    place.store(range(40))
    place.do(pin(range(40), "a"))
    place.do(pin(range(20), "b"))
    assert place.do(Unpin(location=PLACE, pin_id="a")).tokens == 40
    assert place.do(Unpin(location=PLACE, tokens=pack_tokens(range(20)))).tokens == 20
    status = place.do(Unpin(location=PLACE, pin_id="a"))
    assert (status.state, status.tokens, status.message) == ("done", 0, "there was no such pin")


def test_requests_reach_only_the_namespaces_of_their_salt_and_model(place: Place) -> None:
    salted = BASE.variant(cache_salt="s")
    place.namespaces.register(OTHER)
    for space in (BASE, salted, OTHER):
        place.store(range(16), space)
    packed = pack_tokens(range(16))
    assert place.do(Clear(location=PLACE, tokens=packed, cache_salt="s")).tokens == 16
    assert [place.hit(range(16), space) for space in (BASE, salted, OTHER)] == [16, 0, 16]
    assert place.do(Clear(location=PLACE, model="acme/other")).tokens == 16
    assert [place.hit(range(16), space) for space in (BASE, OTHER)] == [16, 0]


def test_a_request_without_tokens_reaches_all_namespaces(place: Place) -> None:
    place.store(range(16))
    place.store(range(16), BASE.variant(lora="x"))
    assert place.do(Clear(location=PLACE)).tokens == 32


def test_clearing_says_what_stays(place: Place) -> None:
    place.store(range(40))
    place.do(pin(range(16)))
    status = place.do(Clear(location=PLACE))
    assert (status.state, status.tokens) == ("done", 24)
    assert status.message == "16 tokens stay because they are pinned"
    assert place.do(Clear(location=PLACE, force=True)).tokens == 16


# Compressing.


def test_compressing_frees_memory_and_reports_each_chunk(place: Place) -> None:
    place.store(range(40))
    running = place.begin(compress(range(40)))
    assert running.scope == Scope(40, 3)
    status = running.wait()
    assert (status.state, status.tokens, status.message) == ("done", 40, "")
    assert [each.chunks_done for each in running.progress] == [1, 2, 3]
    assert status.progress == running.progress[-1]
    assert status.progress.bytes_before == 40 * 256
    assert status.progress.bytes_after == place.engine.stats()["requested_bytes"] < 40 * 256
    assert place.hit(range(40)) == 40


def test_compressing_twice_is_fine_and_says_so(place: Place) -> None:
    place.store(range(40))
    place.do(compress())
    status = place.do(compress())
    assert (status.state, status.tokens) == ("done", 0)
    assert status.message == "3 of 3 chunks were encoded with zip already"


def test_decompressing_is_the_reverse(place: Place) -> None:
    place.store(range(40))
    place.do(compress())
    status = place.do(decompress(range(40)))
    assert (status.state, status.tokens) == ("done", 40)
    assert status.progress.bytes_after == place.engine.stats()["requested_bytes"] == 40 * 256
    assert place.do(decompress()).message == "3 of 3 chunks were raw already"


def test_nothing_to_compress_is_said(place: Place) -> None:
    status = place.do(compress(range(40)))
    assert (status.state, status.message) == ("done", "nothing of this is stored")


def test_a_part_that_cannot_be_compressed_makes_it_partial(place: Place) -> None:
    place.store(range(16))
    place.do(compress())
    place.store(range(16, 48))
    place.codecs.codec.fail = ValueError("over the bound")
    status = place.do(compress())
    assert (status.state, status.tokens) == ("partial", 0)
    assert status.message == (
        "1 of 3 chunks were encoded with zip already; 2 of 3 chunks stay as they were; "
        "over the bound (2 times)"
    )


def test_when_no_chunk_can_be_compressed_it_failed(place: Place) -> None:
    place.store(range(16))
    place.codecs.codec.fail = ValueError("over the bound")
    status = place.do(compress())
    assert status.state == "failed"
    assert status.message == "1 of 1 chunks stay as they were; over the bound"


def test_a_codec_that_cannot_be_made_fails_the_operation(place: Place) -> None:
    place.store(range(40))
    place.codecs.broken = PluginBroken("codec 'zip' cannot be made: boom")
    status = place.do(compress())
    assert (status.state, status.tokens) == ("failed", 0)
    assert "codec 'zip' cannot be made: boom" in status.message


def stuck(place: Place, chunks: int, deadline_s: float = 60) -> Started:
    """Start an operation whose first chunks stay with the codec while its gate is shut."""
    place.store(range(16 * chunks))
    place.codecs.codec.gate.clear()
    running = place.begin(compress(), deadline_s)
    assert place.codecs.codec.begun.acquire(timeout=20)
    return running


def test_a_cancelled_operation_keeps_what_is_done_and_begins_nothing_more(place: Place) -> None:
    running = stuck(place, 30)
    running.cancel()
    place.codecs.codec.gate.set()
    status = running.wait()
    assert status.state == "cancelled"
    assert 16 <= status.tokens < 16 * 30
    done = status.progress.chunks_done
    assert status.message == f"{30 - done} of 30 chunks were not reached"
    assert place.engine.stats()["encoded_chunks_total"] == done


def test_an_operation_whose_time_is_over_expires(place: Place) -> None:
    running = stuck(place, 30, deadline_s=0.05)
    threading.Timer(0.3, place.codecs.codec.gate.set).start()
    assert running.wait().state == "expired"


def test_a_codec_that_hangs_does_not_hold_up_the_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_operation, "GRACE_S", 0.05)
    running = stuck(place, 3, deadline_s=0.05)
    status = running.wait()
    assert (status.state, status.tokens) == ("expired", 0)
    place.codecs.codec.gate.set()
    place.executor.close()
    assert running.statuses == [status]


def test_operations_take_turns(place: Place) -> None:
    first = stuck(place, 30)
    second = place.begin(compress(range(16)))
    place.codecs.codec.gate.set()
    assert second.wait().state in {"done", "partial"}
    assert first.wait().state in {"done", "partial"}


def test_closing_ends_what_runs(place: Place) -> None:
    running = stuck(place, 30)
    place.codecs.codec.gate.set()
    place.executor.close()
    assert running.wait().state in {"cancelled", "done"}


def test_operations_from_many_threads_leave_the_accounts_exact(place: Place) -> None:
    place.store(range(16 * 40))
    works: list[Callable[[], object]] = [
        lambda: place.do(compress()),
        lambda: place.do(decompress()),
        lambda: place.hit(range(16 * 10)),
        lambda: place.do(pin(range(32))),
        lambda: place.do(Unpin(location=PLACE)),
    ]
    threads = [threading.Thread(target=work) for work in works * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place.do(decompress())
    assert place.engine.stats()["requested_bytes"] == 16 * 40 * 256
    assert place.hit(range(16 * 40)) == 16 * 40
    place.do(Clear(location=PLACE, force=True))
    assert place.memory.usage().allocated_bytes == 0
