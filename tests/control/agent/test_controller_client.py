"""A controller that is out of touch is told of once, and so is its return."""

from __future__ import annotations

import logging

import pytest

from lmcache_kit.agent.controller_client import WARN_S, ControllerClient, Identity
from lmcache_kit.protocol.control import FromAgent, NotRegistered, Refused, Registered
from tests.support.clocks import FakeClock

URL = "controller.example:9001"


class Talk:
    """A client whose messages are ``taken`` or not, and what it logs."""

    def __init__(self, caplog: pytest.LogCaptureFixture, heartbeat_s: float = 1.0) -> None:
        self.clock = FakeClock()
        self.taken = True
        self.sent: list[FromAgent] = []
        identity = Identity("a", b"i" * 16, heartbeat_s=heartbeat_s)
        self.client = ControllerClient([], identity, url=URL, clock=self.clock)
        self._caplog = caplog

    def send(self, message: FromAgent) -> bool:
        if self.taken:
            self.sent.append(message)
        return self.taken

    def run(self, seconds: float) -> None:
        """Take turns for so long, whenever the client wants one; no step is without a wait."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.client.turn(self.send)
            wait_s = self.client.wait_s()
            assert wait_s > 0
            self.clock.now = min(until, self.clock.now + wait_s)
        self.client.turn(self.send)

    def told(self, level: int) -> list[str]:
        return [each.getMessage() for each in self._caplog.records if each.levelno == level]


@pytest.fixture
def talk(caplog: pytest.LogCaptureFixture) -> Talk:
    caplog.set_level(logging.INFO)
    return Talk(caplog)


@pytest.mark.parametrize("heartbeat_s", [0.1, 1.0, 60.0])
def test_one_warning_names_the_address_of_a_controller_that_does_not_answer(
    caplog: pytest.LogCaptureFixture, heartbeat_s: float
) -> None:
    talk = Talk(caplog, heartbeat_s)
    talk.taken = False
    talk.run(WARN_S - 1)
    assert talk.told(logging.WARNING) == []
    talk.run(30 - WARN_S + 1)
    [warning] = talk.told(logging.WARNING)
    assert URL in warning
    assert "instance 'a'" in warning
    assert "nothing there takes messages" in warning
    talk.run(3600)
    assert talk.told(logging.WARNING) == [warning]


def test_what_listens_and_says_nothing_is_told_as_that(talk: Talk) -> None:
    talk.run(30)
    [warning] = talk.told(logging.WARNING)
    assert "what listens there says nothing" in warning


def test_what_answers_otherwise_than_a_controller_is_told_as_that(talk: Talk) -> None:
    talk.run(1)
    talk.client.counts["messages_malformed_total"] += 1
    talk.run(30)
    [warning] = talk.told(logging.WARNING)
    assert "no controller of this version" in warning


def test_one_line_says_that_the_controller_is_found(talk: Talk) -> None:
    talk.run(30)
    talk.client.handle(Registered(()))
    talk.run(60)
    [found] = talk.told(logging.INFO)
    assert URL in found
    assert "found again" in found


def test_a_controller_that_answers_in_time_is_not_warned_of(talk: Talk) -> None:
    talk.run(WARN_S - 1)
    talk.client.handle(Registered(()))
    talk.run(3600)
    assert talk.told(logging.WARNING) == []
    assert "found again" not in talk.told(logging.INFO)[0]


def test_a_controller_that_goes_away_is_warned_of_and_its_return_told(talk: Talk) -> None:
    talk.client.handle(Registered(()))
    talk.run(60)
    for times in (1, 2):
        talk.taken = False
        talk.run(60)
        assert len(talk.told(logging.WARNING)) == times
        talk.taken = True
        talk.run(60)
        assert len([line for line in talk.told(logging.INFO) if "found again" in line]) == times


def test_a_controller_that_no_longer_knows_us_and_says_nothing_more_is_warned_of(
    talk: Talk,
) -> None:
    talk.client.handle(Registered(()))
    talk.run(60)
    talk.client.handle(NotRegistered())
    talk.run(30)
    assert len(talk.told(logging.WARNING)) == 1


def test_a_refusal_is_the_only_warning_and_names_the_address(talk: Talk) -> None:
    talk.run(1)
    talk.client.handle(Refused("a namespace cannot be used"))
    talk.run(60)
    talk.client.restart()
    talk.run(60)
    [warning] = talk.told(logging.WARNING)
    assert URL in warning
    assert "a namespace cannot be used" in warning
