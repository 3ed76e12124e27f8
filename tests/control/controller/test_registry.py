"""Liveness, incarnations and bounds, with a clock that the test moves."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lmcache_kit.agent.controller_client import Identity
from lmcache_kit.controller.registry import Registry
from lmcache_kit.errors import ProtocolError, UnknownName
from lmcache_kit.protocol.control import (
    Batch,
    Confirm,
    Confirmed,
    Fenced,
    Goodbye,
    Heartbeat,
    NotRegistered,
    Refused,
    Register,
    Registered,
    Resync,
)
from tests.control.fakes import NAMESPACE, chunks_of
from tests.support.clocks import FakeClock

KEY = chunks_of([1, 2, 3, 4])[0].key


class World:
    """A registry, its clock, and messages to it."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.registry = Registry(clock=self.clock, wall=self.clock, **options)

    def register(self, connection: str, name: str = "a", life: int = 1, **changes: Any) -> object:
        fields: dict[str, Any] = {
            "instance_id": name,
            "incarnation": life.to_bytes(16, "big"),
            "started": float(life),
            "host": f"host{life}",
            "heartbeat_s": 1.0,
            "locations": ("ram",),
            "workers": (),
            "namespaces": (NAMESPACE,),
        }
        self.sent = self.registry.handle(connection, Register(**{**fields, **changes}))
        return dict(self.sent).get(connection)

    def say(self, connection: str, message: Any) -> list[Any]:
        return [answer for _, answer in self.registry.handle(connection, message)]

    def holds(self) -> int:
        self.registry.expire()
        return self.registry.index.held(KEY).bit_count()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def holding(world: World) -> World:
    """Instance a, on connection c1, holds the key."""
    world.register("c1")
    world.say("c1", Batch("ram", 1, KEY, b""))
    assert world.holds() == 1
    return world


def test_three_missed_heartbeats_hide_and_the_next_message_shows(holding: World) -> None:
    holding.clock.now += 2.9
    assert holding.holds() == 1
    holding.clock.now += 0.2
    assert holding.holds() == 0
    assert not holding.registry.find("a").alive
    holding.say("c1", Heartbeat(()))
    assert holding.holds() == 1


def test_any_message_counts_as_a_sign_of_life(holding: World) -> None:
    for seq in range(2, 12):
        holding.clock.now += 1.0
        holding.say("c1", Batch("ram", seq, b"", b""))
    assert holding.holds() == 1


def test_the_namespaces_of_the_silent_are_not_asked_for(holding: World) -> None:
    assert list(holding.registry.namespaces()) == [NAMESPACE]
    holding.clock.now += 5
    assert list(holding.registry.namespaces()) == []
    holding.say("c1", Heartbeat(()))
    assert list(holding.registry.namespaces()) == [NAMESPACE]


def test_goodbye_removes_at_once(holding: World) -> None:
    assert holding.say("c1", Goodbye()) == []
    assert holding.holds() == 0
    with pytest.raises(UnknownName, match=r"unknown instance 'a'\. Known: none\. One that runs"):
        holding.registry.find("a")


def test_the_long_silent_are_dropped_and_their_memory_taken_back(holding: World) -> None:
    holding.clock.now += 119
    holding.registry.expire()
    assert holding.registry.processes()
    holding.clock.now += 2
    assert holding.registry.processes() == []
    assert holding.say("c1", Heartbeat(())) == [NotRegistered()]
    while holding.registry.index.sweep():
        pass
    assert (len(holding.registry.index), holding.registry.index.holders) == (0, 0)


def test_a_later_life_takes_over_and_the_earlier_one_is_told_by_which(holding: World) -> None:
    assert holding.register("c2", life=2) == Registered((("ram", 0),))
    assert ("c1", Fenced("host2")) in holding.sent
    assert holding.holds() == 0
    assert holding.say("c1", Batch("ram", 2, KEY, b"")) == [NotRegistered()]
    assert holding.holds() == 0
    assert holding.registry.counts["messages_unregistered_total"] == 1


def test_an_earlier_life_is_fenced_while_the_later_one_lives(holding: World) -> None:
    holding.register("c2", life=2)
    assert holding.register("c1", life=1) == Fenced("host2")
    assert holding.register("c3", life=1) == Fenced("host2")
    assert holding.registry.find("a").connection == "c2"


def test_an_earlier_life_takes_over_from_a_silent_one_until_that_is_back(holding: World) -> None:
    holding.register("c2", life=2)
    holding.clock.now += 5
    assert holding.register("c1", life=1) == Registered((("ram", 0),))
    assert holding.say("c2", Heartbeat(())) == [NotRegistered()]
    assert holding.register("c2", life=2) == Registered((("ram", 0),))
    assert ("c1", Fenced("host2")) in holding.sent


def test_the_same_life_on_a_new_connection_goes_on_where_it_was(holding: World) -> None:
    assert holding.register("c2") == Registered((("ram", 1),))
    assert holding.holds() == 1
    assert holding.say("c1", Goodbye()) == []
    assert holding.holds() == 1


def test_a_location_that_is_no_longer_named_is_gone(holding: World) -> None:
    assert holding.register("c1", locations=("disk",)) == Registered((("disk", 0),))
    assert holding.holds() == 0
    assert holding.registry.index.holders == 1


def test_a_connection_speaks_for_one_instance(holding: World) -> None:
    holding.register("c1", name="b")
    assert [process.instance_id for process in holding.registry.processes()] == ["b"]
    assert holding.holds() == 0


def test_there_is_no_room_for_one_more_unless_another_is_silent() -> None:
    world = World(max_processes=2)
    world.register("c1", "a")
    world.register("c2", "b")
    assert isinstance(world.register("c3", "c"), Refused)
    world.clock.now += 5
    world.say("c2", Heartbeat(()))
    assert isinstance(world.register("c3", "c"), Registered)
    assert [process.instance_id for process in world.registry.processes()] == ["b", "c"]


def test_a_thousand_restarts_leave_nothing_behind(world: World) -> None:
    for life in range(1, 1001):
        world.register(f"c{life}", life=life)
        world.say(f"c{life}", Batch("ram", 1, KEY, b""))
        while world.registry.index.sweep():
            pass
    index = world.registry.index
    assert (index.holders, len(index), len(index._owners)) == (1, 1, 2)
    assert len(world.registry._connections) == 1
    assert sum(world.registry._namespaces.values()) == 1


def test_a_confirmation_is_of_a_location_of_who_asks(holding: World) -> None:
    assert holding.say("c1", Confirm("ram", 1)) == [Confirmed("ram", 1)]
    assert holding.say("c1", Confirm("ram", 2)) == [Resync("ram", 1)]
    assert holding.say("c2", Confirm("ram", 1)) == [NotRegistered()]
    with pytest.raises(ProtocolError, match="location 'disk' is not registered"):
        holding.say("c1", Confirm("disk", 1))
    assert holding.registry.counts["confirmations_total"] == 1


@pytest.mark.parametrize(
    ("peer_url", "peer_key", "taken"),
    [
        (None, b"", True),
        ("box:1", b"k" * 32, True),
        ("box:1", b"", False),
        ("box:1", b"k" * 31, False),
        (None, b"k" * 32, False),
    ],
)
def test_a_peer_url_comes_with_a_key(
    world: World, peer_url: str | None, peer_key: bytes, taken: bool
) -> None:
    answer = world.register("c1", peer_url=peer_url, peer_key=peer_key)
    assert answer == (Registered((("ram", 0),)) if taken else Refused("the peer key does not fit"))


def test_the_peer_key_is_in_no_repr() -> None:
    key = b"secret" * 5 + b"!!"
    said = Register("a", b"i" * 16, 1.0, "", 1.0, ("ram",), (), (), "box:1", key)
    shown = repr(said) + repr(Identity("a", b"i" * 16, peer_url="box:1", peer_key=key))
    assert "secret" not in shown


class TestLog:
    """What an operator reads at INFO."""

    @pytest.fixture(autouse=True)
    def at_info(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "lmcache_kit.controller")
        self.caplog = caplog

    def lines(self) -> list[str]:
        """What was logged since the last call."""
        lines = [record.getMessage() for record in self.caplog.records]
        self.caplog.clear()
        return lines

    def test_one_life_of_an_instance_is_told(self, world: World) -> None:
        world.register("c1")
        [registered] = self.lines()
        assert "instance 'a' at 'host1' is registered, with 'ram'" in registered
        world.clock.now += 3.1
        world.registry.expire()
        [lost] = self.lines()
        assert "instance 'a' at 'host1' is lost" in lost
        world.say("c1", Heartbeat(()))
        [back] = self.lines()
        assert "is heard of again" in back
        world.register("c2")
        [reconnected] = self.lines()
        assert "new connection" in reconnected
        world.say("c2", Goodbye())
        [ended] = self.lines()
        assert "says goodbye" in ended
        world.registry.handle("c3", _registration(), "10.0.0.7")
        [other] = self.lines()
        assert "'host1' (10.0.0.7)" in other
        world.clock.now += 200
        world.registry.expire()
        lost, dropped = self.lines()
        assert "is dropped" in dropped

    def test_a_fenced_one_is_told_once(self, world: World) -> None:
        world.register("c2", life=2)
        self.lines()
        for _ in range(5):
            world.register("c1", life=1)
        [fenced] = self.lines()
        assert "instance 'a' at 'host1' is fenced" in fenced
        assert "'host2' started later" in fenced

    def test_one_that_a_later_one_fences_is_told(self, world: World) -> None:
        world.register("c1", life=1)
        self.lines()
        world.register("c2", life=2)
        fenced, registered = self.lines()
        assert "instance 'a' at 'host1' is fenced: a process at 'host2' started later" in fenced
        assert "'host2' is registered" in registered

    def test_a_refused_one_is_told_once_with_the_reason(self, world: World) -> None:
        for _ in range(5):
            world.register("c1", locations=())
        [refused] = self.lines()
        assert "is refused: not 1 to 8 locations" in refused

    def test_heartbeats_and_changes_are_not_told(self, holding: World) -> None:
        self.lines()
        for _ in range(10):
            holding.clock.now += 1
            holding.say("c1", Heartbeat(()))
        assert self.lines() == []

    def test_no_name_can_write_a_line_of_its_own(self, world: World) -> None:
        forged = "a\n2030-01-01 INFO all is well"
        world.register("c1", name=forged, host=forged, locations=(forged,))
        world.register("c2", name=forged, life=2, locations=())
        assert not any("\n" in line for line in self.lines())


def _registration() -> Register:
    return Register("a", b"j" * 16, 5.0, "host1", 1.0, ("ram",), (), (NAMESPACE,))
