"""Both ends of a connection of the control plane, without the connection."""

from __future__ import annotations

from typing import Any

from lmcache_kit.agent.controller_client import ControllerClient, Identity
from lmcache_kit.agent.event_log import EventLog
from lmcache_kit.agent.location_feed import LocationFeed
from lmcache_kit.agent.sync_barrier import Barrier
from lmcache_kit.controller.registry import Registry
from lmcache_kit.protocol import control as wire
from tests.control.fakes import NAMESPACE, FakeTier
from tests.support.clocks import FakeClock


class Pair:
    """A client and a registry, with a connection that tests carry by hand."""

    def __init__(self, **limits: Any) -> None:
        self.clock = FakeClock()
        self.tier = FakeTier()
        self.feed = LocationFeed(self.tier, EventLog(self.tier.location, **limits))
        self.feed.start()
        self.client = ControllerClient([self.feed], Identity("a", b"i" * 16), clock=self.clock)
        self.client.register_namespace(NAMESPACE)
        self.restart_controller()

    def restart_controller(self) -> None:
        self.registry = Registry(clock=self.clock, wall=self.clock)

    def turn(self) -> list[wire.FromAgent]:
        """What the client says."""
        sent: list[wire.FromAgent] = []
        self.client.turn(lambda message: not sent.append(message))  # type: ignore[func-returns-value]
        return sent

    def exchange(self, lost: type[Any] | tuple[()] = ()) -> list[wire.FromAgent]:
        """Carry the messages of a turn, and the answers. Messages of type ``lost`` are dropped."""
        sent = self.turn()
        for message in sent:
            if not isinstance(message, lost):
                for _, answer in self.registry.handle("c", message):
                    self.client.handle(answer)
        return sent

    def open(self) -> Barrier:
        return self.feed.sync.open()
