"""Moves between real processes that die, stop and start again at every step."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_kit.keys import Namespace
from tests.peer.faulty import DELETED, GOAL_STEPS, SOURCE_STEPS
from tests.peer.fleet import CHUNK, LAYOUT, Fleet, Instance, eventually, fleet_in, short_path

TOKENS = range(256 * 9 + 12)
FINAL = ("done", "partial", "failed", "expired")
STOPPED_STEPS = ["asked", "leased", "offered", "being read", "to delete"]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with short_path() as folder, fleet_in(folder) as fleet:
        yield fleet


@pytest.fixture
def make(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Starts instances, with the fault of one step if asked; ends them."""
    made: list[Instance] = []

    def make(name: str, step: str = "", action: str = "kill", **keys: Any) -> Instance:
        faulty = Path(__file__).with_name("faulty.py")
        prefix = (sys.executable, str(faulty), step, action) if step else (sys.executable,)
        made.append(fleet.instance(f"{name}-{len(fleet.instances)}", prefix=prefix, **keys))
        return made[-1]

    yield make
    for instance in made:
        instance.end()


def stored(fleet: Fleet, instance: Instance) -> None:
    """Have TOKENS there, and the controller know it."""
    instance.store(TOKENS)
    eventually(lambda: fleet.lookup(TOKENS).get(instance.name) == len(TOKENS), "lookup")


def begun(fleet: Fleet, source: Instance, goal: Instance, **more: Any) -> str:
    """The event of a move, also of one that could not be answered properly."""
    fleet.begin(source.name, goal.name, TOKENS, **more)
    _, events = fleet.ask(f"/events?instance_id={goal.name}&operation=move")
    return str(events["events"][0]["event_id"])


def past_its_deadline(
    fleet: Fleet, source: Instance, goal: Instance, stops: Instance
) -> dict[str, Any]:
    """The event of a move in which this one stopped itself. A slow machine needs more time to get
    so far."""
    for deadline_s in (2.0, 8.0, 30.0):
        event: dict[str, Any] = fleet.ended(begun(fleet, source, goal, deadline_s=deadline_s))
        if stops.program.stopped:
            return event
    raise AssertionError("it never got so far")


def heal(instance: Instance) -> None:
    """Start it again, without its fault."""
    instance.program.process.wait(20)
    instance.prefix = (sys.executable,)
    instance.restart()


@pytest.mark.parametrize("step", GOAL_STEPS)
def test_a_destination_that_dies_costs_the_source_nothing(
    fleet: Fleet, make: Any, step: str
) -> None:
    source, goal = make("source"), make("goal", step)
    stored(fleet, source)
    event_id = begun(fleet, source, goal)
    heal(goal)
    assert fleet.ended(event_id)["state"] in ("failed", "expired")
    assert source.hit(TOKENS) == len(TOKENS)
    assert fleet.lookup(TOKENS).get(source.name) == len(TOKENS)
    source.rest()
    assert fleet.move(source.name, goal.name, TOKENS)["state"] == "done"
    assert goal.hit(TOKENS) == len(TOKENS)


@pytest.mark.parametrize("step", SOURCE_STEPS)
def test_a_source_that_dies_ends_the_move_at_once_and_what_came_is_right(
    fleet: Fleet, make: Any, step: str
) -> None:
    source, goal = make("source", step), make("goal")
    stored(fleet, source)
    event = fleet.ended(begun(fleet, source, goal))
    assert event["state"] in ("failed", "partial")
    assert source.name in event["message"] or "127.0.0.1" in event["message"]
    came = goal.hit(TOKENS)
    assert came == event["num_tokens"] or event["state"] == "failed"
    goal.rest()
    heal(source)
    stored(fleet, source)
    assert fleet.move(source.name, goal.name, TOKENS)["state"] == "done"
    assert goal.hit(TOKENS) == len(TOKENS)


@pytest.mark.parametrize("step", DELETED)
def test_a_source_that_dies_when_it_has_deleted_leaves_everything_at_the_destination(
    fleet: Fleet, make: Any, step: str
) -> None:
    source, goal = make("source", step), make("goal")
    stored(fleet, source)
    event = fleet.ended(begun(fleet, source, goal))
    assert (event["state"], event["num_tokens"]) == ("partial", len(TOKENS))
    assert goal.hit(TOKENS) == len(TOKENS)
    assert fleet.lookup(TOKENS)[goal.name] == len(TOKENS)
    goal.rest()


@pytest.mark.parametrize(("end", "step"), [("source", "being read"), ("goal", "reading")])
def test_an_abort_inside_nixl_ends_one_process_and_the_other_goes_on(
    fleet: Fleet, make: Any, end: str, step: str
) -> None:
    steps = {end: (step, "abort")}
    source = make("source", *steps.get("source", ()), transfer_channel="nixl")
    goal = make("goal", *steps.get("goal", ()), transfer_channel="nixl")
    stored(fleet, source)
    event_id = begun(fleet, source, goal)
    heal(source if end == "source" else goal)
    fleet.ended(event_id)
    if end == "source":
        goal.rest()
        stored(fleet, source)
    assert source.hit(TOKENS) == len(TOKENS)
    event = fleet.move(source.name, goal.name, TOKENS)
    assert (event["state"], event["progress"][0]["transfer"]["transport"]) == ("done", "nixl")
    assert goal.hit(TOKENS) == len(TOKENS)


@pytest.mark.parametrize("channel", ["tcp", "nixl"])
@pytest.mark.parametrize("step", STOPPED_STEPS)
def test_a_source_that_stops_past_the_deadline_and_goes_on_later_spoils_nothing(
    fleet: Fleet, make: Any, step: str, channel: str
) -> None:
    source = make("source", step, "stop", transfer_channel=channel)
    goal = make("goal", transfer_channel=channel)
    stored(fleet, source)
    event = past_its_deadline(fleet, source, goal, source)
    assert event["state"] in ("expired", "failed", "partial")
    others = range(50_000, 50_000 + 256 * 20)
    goal.store(others)
    source.program.send(signal.SIGCONT)
    goal.rest()
    eventually(lambda: source.idle, "the source holds something")
    assert goal.hit(others) == len(others)
    if step == "to delete":  # it was told to, and does
        eventually(lambda: source.hit(TOKENS) == 0, "the source deletes")
    else:
        assert source.hit(TOKENS) == len(TOKENS)
        assert fleet.move(source.name, goal.name, TOKENS)["state"] == "done"
    assert goal.hit(TOKENS) == len(TOKENS)


@pytest.mark.parametrize("step", ["accepted", "room made", "reading", "to confirm"])
def test_a_destination_that_stops_is_let_go_and_its_leases_end_by_themselves(
    fleet: Fleet, make: Any, step: str
) -> None:
    source = make("source", lease_ttl_s=1.0)
    goal = make("goal", step, "stop")
    stored(fleet, source)
    event = past_its_deadline(fleet, source, goal, goal)
    assert event["state"] in ("expired", "failed")
    source.rest()
    others = range(50_000, 50_000 + 256 * 20)
    source.store(others)
    goal.program.send(signal.SIGCONT)
    goal.rest()
    assert source.hit(TOKENS) == len(TOKENS)
    assert source.hit(others) == len(others)
    came = goal.hit(TOKENS)
    assert came in range(len(TOKENS) + 1)


def test_at_every_moment_the_controller_knows_a_whole_copy(fleet: Fleet, make: Any) -> None:
    one, other = make("one"), make("other")
    stored(fleet, one)
    least, over = [len(TOKENS)], threading.Event()

    def watch() -> None:
        while not over.is_set():
            least.append(max(fleet.lookup(TOKENS).values(), default=0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(10):
            assert fleet.move(one.name, other.name, TOKENS)["state"] == "done"
            one, other = other, one
    finally:
        over.set()
        watcher.join()
    assert len(least) > 10
    assert min(least) == len(TOKENS)


def test_the_same_key_twice_is_one_move(fleet: Fleet, make: Any) -> None:
    source, goal = make("source"), make("goal")
    stored(fleet, source)
    replies = [
        fleet.begin(source.name, goal.name, TOKENS, idempotency_key=source.name) for _ in range(2)
    ]
    assert replies[0] == replies[1]
    assert replies[0][1]["num_tokens"] == len(TOKENS)
    assert fleet.ended(replies[0][1]["event_id"])["state"] == "done"
    assert goal.stats()["moved_in_chunks_total"] == 10


def test_a_new_life_of_the_source_is_taken_from_over_a_new_link(fleet: Fleet, make: Any) -> None:
    source, goal = make("source"), make("goal")
    stored(fleet, source)
    assert fleet.move(source.name, goal.name, TOKENS)["state"] == "done"
    source.restart()
    source.store(range(7000, 7012))
    eventually(lambda: fleet.lookup(range(7000, 7012)), "lookup")
    event = fleet.move(source.name, goal.name, range(7000, 7012))
    assert (event["state"], event["num_tokens"]) == ("done", 12)
    assert goal.hit(range(7000, 7012)) == 12


def test_a_controller_that_dies_meanwhile_leaves_the_source_as_it_is() -> None:
    with short_path() as folder, fleet_in(folder) as fleet:
        faulty = Path(__file__).with_name("faulty.py")
        source = fleet.instance("source")
        goal = fleet.instance("goal", prefix=(sys.executable, str(faulty), "to confirm", "stop"))
        stored(fleet, source)
        begun(fleet, source, goal, deadline_s=60.0)
        eventually(lambda: goal.program.stopped, "the goal stops")
        fleet.controller.end()
        goal.program.send(signal.SIGCONT)
        eventually(lambda: goal.hit(TOKENS) == len(TOKENS), "all has come")
        assert source.hit(TOKENS) == len(TOKENS)
        fleet.start_controller()
        eventually(lambda: fleet.lookup(TOKENS).get(goal.name) == len(TOKENS), "lookup")
        source.rest()
        goal.rest()
        assert goal.hit(TOKENS) == len(TOKENS)


def test_what_cannot_be_moved_is_said_with_the_fitting_status(fleet: Fleet, make: Any) -> None:
    source, goal = make("source"), make("goal")
    alone = make("alone", enable_p2p=False)
    status, reply = fleet.begin(source.name, source.name, TOKENS)
    assert (status, reply["error"]["message"]) == (422, "source and destination are the same")
    status, reply = fleet.begin("nobody", goal.name, TOKENS)
    assert (status, "unknown instance 'nobody'") == (404, reply["error"]["message"])
    status, reply = fleet.ask(
        "/move",
        {"old_position": [source.name, "LocalCPUBackend"], "new_position": [goal.name, "x"]},
    )
    assert (status, "unknown location 'x'") == (404, reply["error"]["message"])
    for pair in ((alone.name, goal.name), (source.name, alone.name)):
        status, reply = fleet.begin(*pair, TOKENS)
        assert status == 409
        assert "takes no part in moves" in reply["error"]["message"]


def test_of_no_use_to_the_destination_is_an_error_that_names_the_field(
    fleet: Fleet, make: Any
) -> None:
    source, goal = make("source"), make("goal", base=Namespace("acme/other", LAYOUT, CHUNK))
    stored(fleet, source)
    status, reply = fleet.begin(source.name, goal.name, TOKENS)
    assert status >= 400
    assert "model is acme/model there and acme/other here" in reply["error"]["message"]
    assert source.hit(TOKENS) == len(TOKENS)
