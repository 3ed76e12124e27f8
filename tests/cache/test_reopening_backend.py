"""A backend that is opened when it can be."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from lmcache_kit.cache.tiers import reopening_backend
from lmcache_kit.cache.tiers.reopening_backend import ReopeningBackend
from lmcache_kit.errors import BackendError, ConfigError
from tests.cache.stores import Dict, SharedDict
from tests.support.clocks import FakeClock
from tests.support.waiting import DEADLINE_S

KEY = bytes(16)


class Maker:
    """Counts attempts to open ``backend``, which fail with ``failure`` unless that is None."""

    def __init__(self, backend: Dict, failure: Exception | None = None) -> None:
        self.backend = backend
        self.failure = failure
        self.attempts = 0

    def __call__(self) -> Dict:
        self.attempts += 1
        if self.failure:
            raise self.failure
        return self.backend


def test_it_is_opened_by_the_first_call_and_once() -> None:
    make = Maker(Dict())
    backend = ReopeningBackend(make)
    assert make.attempts == 0
    assert backend.put(KEY, b"meta", [memoryview(b"data")])
    assert backend.contains([KEY, bytes(range(16))]) == [True, False]
    assert [each.key for each in backend.scan()] == [KEY]
    assert backend.usage().entries == 1
    backend.remove([KEY])
    assert backend.get(KEY) is None
    assert make.attempts == 1


def test_a_failure_has_its_cause_and_its_remedy_and_is_tried_again_after_a_while() -> None:
    make, clock = Maker(Dict(), BackendError("read-only", hint="Mount it")), FakeClock()
    backend = ReopeningBackend(make, clock=clock)
    for _ in range(3):
        with pytest.raises(BackendError, match=r"read-only\. Mount it"):
            backend.usage()
    assert make.attempts == 1
    clock.now += reopening_backend.AGAIN_S
    make.failure = None
    assert backend.usage().entries == 0
    assert make.attempts == 2


@pytest.mark.parametrize("failure", [OSError("gone"), ConfigError("no such profile")])
def test_whatever_opening_raises_a_call_raises_a_backend_error(failure: Exception) -> None:
    backend = ReopeningBackend(Maker(Dict(), failure))
    with pytest.raises(BackendError, match=str(failure)):
        backend.contains([KEY])


def test_opening_alone_tells_a_mistake_from_trouble() -> None:
    with pytest.raises(ConfigError, match="no such profile"):
        ReopeningBackend(Maker(Dict(), ConfigError("no such profile"))).open()


def test_nobody_waits_for_an_attempt_of_another_thread() -> None:
    opens, may_open = threading.Event(), threading.Event()

    def make() -> Dict:
        opens.set()
        may_open.wait(DEADLINE_S)
        return Dict()

    backend = ReopeningBackend(make)
    first = threading.Thread(target=backend.open)
    first.start()
    assert opens.wait(DEADLINE_S)
    with pytest.raises(BackendError, match="still being opened"):
        backend.usage()
    may_open.set()
    first.join()
    assert backend.usage().entries == 0


def test_what_opens_after_the_end_is_closed_at_once() -> None:
    inner = Dict()
    backend: ReopeningBackend

    def make() -> Dict:
        backend.close()
        return inner

    backend = ReopeningBackend(make)
    backend.open()
    assert inner.closed
    with pytest.raises(BackendError, match="closed"):
        backend.usage()


def test_a_closed_one_is_not_opened() -> None:
    make = Maker(Dict())
    backend = ReopeningBackend(make)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.usage()
    assert make.attempts == 0


def test_it_is_shared_as_the_opened_one_is() -> None:
    backend = ReopeningBackend(Maker(SharedDict()))
    assert not backend.shared
    backend.open()
    assert backend.shared
    assert ReopeningBackend(Maker(SharedDict()), shared=True).shared


def test_metrics_are_those_of_the_opened_one() -> None:
    class Reporting(Dict):
        def metrics(self) -> Mapping[str, float]:
            return {"depth": 3.0}

    backend = ReopeningBackend(Maker(Reporting()))
    assert backend.metrics() == {}
    backend.open()
    assert backend.metrics() == {"depth": 3.0}
    plain = ReopeningBackend(Maker(Dict()))
    plain.open()
    assert plain.metrics() == {}
