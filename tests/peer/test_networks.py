"""Moves between two network namespaces: over a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peer.fleet import Fleet, Instance, eventually, fleet_in, short_path

TOKENS = range(256 * 9 + 12)
FAULTY = str(Path(__file__).with_name("faulty.py"))


class Cable:
    """A namespace, and a cable to it. ``near`` and ``far`` are the addresses of its two ends."""

    def __init__(self) -> None:
        number = os.getpid() % 250 + 1
        self.name = f"lk{os.getpid()}"
        self.near, self.far = f"10.213.{number}.1", f"10.213.{number}.2"
        self._ip("netns", "add", self.name)
        self._ip("link", "add", f"{self.name}n", "type", "veth", "peer", "name", "eth0",
                 "netns", self.name)  # fmt: skip
        self._ip("address", "add", f"{self.near}/24", "dev", f"{self.name}n")
        self._ip("link", "set", f"{self.name}n", "up")
        for words in ("link set lo up", f"address add {self.far}/24 dev eth0", "link set eth0 up"):
            self._ip("-netns", self.name, *words.split())

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to run a program at the far end with."""
        return ("ip", "netns", "exec", self.name, sys.executable)

    def plug(self, state: str) -> None:
        """``up`` or ``down``."""
        self._ip("link", "set", f"{self.name}n", state)

    def close(self) -> None:
        self._ip("netns", "delete", self.name)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=20)


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    assert shutil.which("ip"), "the tests need the command ip: install the package iproute2"
    cable = Cable()
    yield cable
    cable.close()


@pytest.fixture
def fleet(cable: Cable) -> Iterator[Fleet]:
    with short_path() as folder, fleet_in(folder, cable.near, "--insecure") as fleet:
        yield fleet


def near(fleet: Fleet, cable: Cable, step: str = "") -> Instance:
    prefix = (sys.executable, FAULTY, step, "stop") if step else (sys.executable,)
    return fleet.instance("near", p2p_host=cable.near, lease_ttl_s=1.0, prefix=prefix)


def far(fleet: Fleet, cable: Cable) -> Instance:
    return fleet.instance("far", p2p_host=cable.far, prefix=cable.prefix)


def stored(fleet: Fleet, instance: Instance) -> None:
    instance.store(TOKENS)
    eventually(lambda: fleet.lookup(TOKENS).get(instance.name) == len(TOKENS), "lookup")


def test_kv_moves_to_another_namespace_and_back(fleet: Fleet, cable: Cable) -> None:
    one, other = near(fleet, cable), far(fleet, cable)
    stored(fleet, one)
    event = fleet.move("near", "far", TOKENS)
    assert (event["state"], event["num_tokens"]) == ("done", len(TOKENS))
    assert event["progress"][0]["transfer"]["transport"] == "tcp"
    assert (one.hit(TOKENS), other.hit(TOKENS)) == (0, len(TOKENS))
    assert fleet.move("far", "near", TOKENS)["state"] == "done"
    assert (one.hit(TOKENS), other.hit(TOKENS)) == (len(TOKENS), 0)


def test_a_cable_that_is_pulled_in_the_middle_ends_the_move_in_time_and_loses_nothing(
    fleet: Fleet, cable: Cable
) -> None:
    one, other = near(fleet, cable, "being read"), far(fleet, cable)
    stored(fleet, one)
    status, reply = fleet.begin("near", "far", TOKENS, deadline_s=4.0)
    assert status == 200, reply
    eventually(lambda: one.program.stopped, "the source stops")
    cable.plug("down")
    one.program.send(signal.SIGCONT)
    event = fleet.ended(reply["event_id"])
    assert event["state"] in ("expired", "failed", "partial")
    one.rest()
    assert one.hit(TOKENS) == len(TOKENS)
    assert fleet.lookup(TOKENS) == {"near": len(TOKENS)}
    cable.plug("up")
    other.rest()
    eventually(lambda: any(w["instance_id"] == "far" and w["alive"] for w in fleet.workers()))
    assert fleet.move("near", "far", TOKENS)["state"] == "done"
    assert other.hit(TOKENS) == len(TOKENS)
