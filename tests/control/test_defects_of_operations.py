"""What went wrong with the operations of another control plane, each as a test on ours: a real
controller, agent, engine and memory, and a codec that fails when it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from lmcache_kit.interfaces import Region
from lmcache_kit.interfaces.frontend import OperationInfo
from lmcache_kit.interfaces.operations import (
    Clear,
    Compress,
    Decompress,
    OperationRequest,
    Pin,
    Unpin,
)
from lmcache_kit.keys import pack_tokens
from tests.control.conftest import Running, StartAgent
from tests.process.test_operations import BASE, CHUNK, PLACE, Place
from tests.support.waiting import eventually

PROMPT = list(range(40))
TOKENS = pack_tokens(PROMPT)
COMPRESS = Compress(location=PLACE, method="zip", tokens=TOKENS)
DECOMPRESS = Decompress(location=PLACE, method="zip", tokens=TOKENS)


@dataclass
class Site:
    """The instance ``a`` with PROMPT in its cache, and its controller."""

    running: Running
    place: Place

    def begin(self, request: OperationRequest, **more: Any) -> OperationInfo:
        return self.running.run(self.running.controller.operations.start("a", request, **more))

    def ended(self, info: OperationInfo) -> OperationInfo:
        return self.running.run(self.running.controller.operations.wait(info.operation_id))

    def do(self, request: OperationRequest, **more: Any) -> OperationInfo:
        return self.ended(self.begin(request, **more))

    @property
    def allocated_bytes(self) -> int:
        return self.place.memory.usage().allocated_bytes

    def check_bytes(self) -> None:
        """All of PROMPT is a hit, and reads as it was stored."""
        engine = self.place.engine
        match = engine.lookup(BASE.digest, TOKENS, CHUNK, 1, "reader", 20)
        assert match.chunks[-1].end == len(PROMPT)
        for chunk in match.chunks:
            [extent] = chunk.extents
            data = bytes(self.place.memory.view(Region(extent.offset, extent.nbytes)))
            assert xxh3_64_intdigest(data) == extent.checksum
            assert data == bytes(range(16)) * (extent.nbytes // 16)
        engine.release(match.lease, None)


@pytest.fixture
def site(controller: Running, start_agent: StartAgent) -> Iterator[Site]:
    place = Place()
    agent, _ = start_agent(
        controller.url,
        engine=place.engine,
        executor=place.executor,
        namespaces=(BASE,),
    )
    place.store(PROMPT)
    eventually(lambda: controller.held(PROMPT) == {"a": 40})
    yield Site(controller, place)
    agent.stop()
    place.close()


def test_7_a_failure_is_not_told_as_success_and_loses_nothing(site: Site) -> None:
    site.place.codecs.codec.fail = ValueError("over the bound")
    info = site.do(COMPRESS)
    assert (info.state, info.tokens) == ("failed", 0)
    assert "over the bound" in info.message
    site.check_bytes()
    assert site.running.held(PROMPT) == {"a": 40}


def test_7_what_hangs_ends_by_its_deadline(site: Site) -> None:
    site.place.codecs.codec.gate.clear()
    info = site.do(COMPRESS, deadline_s=0.5)
    assert info.state == "expired"
    assert info.ended_at
    assert info.ended_at - info.deadline < 5
    site.place.codecs.codec.gate.set()
    site.check_bytes()


def test_8_a_chunk_is_found_and_read_all_the_time_while_it_is_compressed(site: Site) -> None:
    site.place.codecs.codec.gate.clear()
    info = site.begin(COMPRESS)
    assert site.place.codecs.codec.begun.acquire(timeout=20)
    site.check_bytes()
    assert site.running.held(PROMPT) == {"a": 40}
    site.place.codecs.codec.gate.set()
    assert site.ended(info).state == "done"
    site.check_bytes()
    assert site.running.held(PROMPT) == {"a": 40}
    assert site.running.counters()["keys_removed_total"] == 0


def test_8_compressed_bytes_count_as_what_they_are(site: Site) -> None:
    """Chunks here are as small as a page, so that pages cannot become fewer."""
    stats, before = site.place.engine.stats, site.allocated_bytes
    assert stats()["requested_bytes"] == 40 * 256
    info = site.do(COMPRESS)
    part = info.progress
    assert part.bytes_before == 40 * 256
    assert part.bytes_after == stats()["requested_bytes"]
    assert info.ratio == part.bytes_before / part.bytes_after > 1
    assert part.bytes_after <= site.allocated_bytes <= before


def test_8_compressing_twice_is_no_error_and_says_so(site: Site) -> None:
    first, second = site.do(COMPRESS), site.do(COMPRESS)
    assert (first.state, first.tokens, first.message) == ("done", 40, "")
    assert (second.state, second.tokens) == ("done", 0)
    assert second.message == "3 of 3 chunks were encoded with zip already"


def test_8_nothing_is_held_any_more_when_an_operation_has_ended(site: Site) -> None:
    codec = site.place.codecs.codec
    site.do(COMPRESS)
    site.do(DECOMPRESS)
    codec.fail = ValueError("over the bound")
    site.do(COMPRESS)
    codec.fail = None
    codec.gate.clear()
    info = site.begin(COMPRESS)
    assert codec.begun.acquire(timeout=20)
    cancelling = site.running.begin(site.running.controller.operations.cancel(info.operation_id))
    codec.gate.set()
    cancelling.result(20)
    assert site.ended(info).state in ("cancelled", "done", "partial")
    assert site.do(Pin(location=PLACE, tokens=TOKENS, pin_id="")).tokens == 40
    assert site.do(Unpin(location=PLACE, tokens=TOKENS)).tokens == 40
    cleared = site.do(Clear(location=PLACE))
    assert (cleared.state, cleared.tokens, cleared.message) == ("done", 40, "")
    assert site.allocated_bytes == 0
    eventually(lambda: site.running.held(PROMPT) == {})


def test_pinned_chunks_outlast_a_clear_unless_it_is_forced(site: Site) -> None:
    pinned = site.do(Pin(location=PLACE, tokens=TOKENS[: CHUNK * 4], pin_id="", owner="ann"))
    cleared = site.do(Clear(location=PLACE))
    assert cleared.tokens == 24
    eventually(lambda: site.running.held(PROMPT) == {"a": 16})
    (found,) = site.running.run(site.running.controller.operations.pins()).pins
    assert (found.pin.pin_id, found.pin.tokens, found.pin.owner) == (pinned.operation_id, 16, "ann")
    assert site.do(Clear(location=PLACE, force=True)).tokens == 16
    eventually(lambda: site.running.held(PROMPT) == {})
