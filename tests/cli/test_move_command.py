"""``lmcache-kit move``, and how ``lmcache-kit events`` shows moves."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.cli.conftest import Start, event_in, kit
from tests.support.terminals import on_a_terminal

pytestmark = pytest.mark.usefixtures("poll_quickly")

ANSWER = {"event_id": "e1", "num_tokens": 12}
ENDS = ("--from", "a", "--to", "b")
PLACES = {
    "path": "/move",
    "old_position": ["a", "LocalCPUBackend"],
    "new_position": ["b", "LocalCPUBackend"],
}
TRANSFER = {
    "transport": "nixl",
    "how": "CMA on one host",
    "bytes": 276480,
    "seconds": 0.0002,
    "gb_per_s": 1.2,
}


def event(state: str = "done", transfer: object = TRANSFER, **changes: Any) -> dict[str, Any]:
    running = state in ("queued", "running")
    part = {
        "instance_id": "b",
        "location": "LocalCPUBackend",
        "worker_ids": [0],
        "chunks_done": 0 if running else 1,
        "chunks": 1,
        "bytes_before": 276480,
        "bytes_after": 276480,
        "transfer": transfer,
    }
    about = {
        "operation": "move",
        "instance_id": "b",
        "location": "LocalCPUBackend",
        "old_position": ["a", "LocalCPUBackend"],
        "new_position": ["b", "LocalCPUBackend"],
        "ratio": None,
    }
    return event_in(state, part, **{**about, **changes})


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("1", "2"), {"tokens": [1, 2]}),
        (("--all",), {}),
        (("1", "--copy"), {"tokens": [1], "copy": True}),
        (
            ("--all", "--from-location", "ram", "--to-location", "disk"),
            {"old_position": ["a", "ram"], "new_position": ["b", "disk"]},
        ),
        (
            ("1", "--model", "m", "--cache-salt", "s", "--deadline", "5", "--idempotency-key", "k"),
            {
                "tokens": [1],
                "model": "m",
                "cache_salt": "s",
                "deadline_s": 5.0,
                "idempotency_key": "k",
            },
        ),
    ],
)
def test_what_is_written_is_sent(
    start: Start, arguments: tuple[str, ...], asked: dict[str, object]
) -> None:
    server = start(ANSWER)
    result = kit("move", *arguments, *ENDS, "--url", server.url)
    assert result.exit_code == 0, result.output
    assert server.asked == [{**PLACES, **asked}]


def test_tokens_may_come_from_a_pipe(start: Start) -> None:
    server = start(ANSWER)
    kit("move", *ENDS, "--url", server.url, stdin='{"count": 2, "tokens": [4, 5]}')
    assert server.asked[0]["tokens"] == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1", "--to", "b"), "Missing option '--from'"),
        (("1", "--from", "a"), "Missing option '--to'"),
        ((*ENDS, "--file", "nowhere.json"), "nowhere.json holds no JSON"),
        (("1", *ENDS, "--all"), "name tokens or --all, not both"),
    ],
)
def test_a_wrong_call_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = kit("move", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("more", "word"), [((), "Moving"), (("--copy",), "Copying")])
def test_without_wait_it_says_what_began_and_how_to_follow(
    start: Start, more: tuple[str, ...], word: str
) -> None:
    result = kit("move", "--all", *ENDS, *more, "--url", start(ANSWER).url)
    assert result.stdout == (
        f"{word} 12 tokens (event e1)\nFollow it with: lmcache-kit events e1 --wait\n"
    )


def test_wait_tells_how_many_bytes_came_over_what_and_how_fast(start: Start) -> None:
    server = start(ANSWER, event("queued", None), event("running"), event())
    result = kit("move", "--all", *ENDS, "--wait", "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout == (
        "done: 12 tokens; 1 of 1 chunk; 270.0 KiB by nixl (CMA on one host), 1.2 GB/s\n"
    )
    assert result.stderr == (
        "queued: 0 of 1 chunks\nrunning: 0 of 1 chunks; 270.0 KiB by nixl, 1.2 GB/s\n"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gb_per_s": 0.0123}, "270.0 KiB by nixl (CMA on one host), 12.3 MB/s"),
        ({"gb_per_s": 0.0, "how": ""}, "270.0 KiB by nixl"),
        ({"bytes": 0}, "1 of 1 chunk"),
    ],
)
def test_what_is_not_known_is_left_out(start: Start, changes: dict[str, Any], line: str) -> None:
    ended = event(transfer={**TRANSFER, **changes})
    result = kit("events", "e1", "--wait", "--url", start(ended).url)
    assert result.stdout.rstrip().endswith(f"; {line}")


def test_7_a_failure_is_told_as_one(start: Start) -> None:
    server = start(ANSWER, event("failed", None, num_tokens=0, message="no room at 'b'"))
    result = kit("move", "--all", *ENDS, "--wait", "--url", server.url)
    assert result.exit_code == 1
    assert result.stdout.startswith("failed: 0 tokens")
    assert result.stdout.endswith("; no room at 'b'\n")


def test_json_is_the_controllers_answer(start: Start) -> None:
    server = start(ANSWER, event())
    assert json.loads(kit("move", "1", *ENDS, "--json", "--url", server.url).stdout) == ANSWER
    assert json.loads(kit("events", "e1", "--json", "--url", server.url).stdout) == event()


def test_events_show_both_ends_where_they_differ(start: Start) -> None:
    other = event(old_position=["a", "disk"])
    server = start({"events": [event(), other]})
    _, *rows = kit("events", "--url", server.url).stdout.splitlines()
    first, second = (re.split(r"  +", row) for row in rows)
    assert first[1:4] == ["move", "a -> b", "LocalCPUBackend"]
    assert second[1:4] == ["move", "a -> b", "disk -> LocalCPUBackend"]


def test_on_a_terminal_the_bar_shows_the_transport(start: Start) -> None:
    server = start(ANSWER, event("running"), event("running"), event())
    done = on_a_terminal("move", "--all", *ENDS, "--wait", "--url", server.url, columns=140)
    assert done.returncode == 0
    assert done.stdout.startswith("done: 12 tokens")
    assert "move, running" in done.screen
    assert "270.0 KiB by nixl, 1.2 GB/s" in done.screen
