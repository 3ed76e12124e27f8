"""``lmcache-kit pin``, ``unpin``, ``pins``, ``clear``, ``compress``, ``decompress``, ``events``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmcache_kit.cli import _follow
from tests.cli.conftest import Start, event_in, kit
from tests.support.processes import run_python
from tests.support.terminals import on_a_terminal

pytestmark = pytest.mark.usefixtures("poll_quickly")

PLACE = {"instance_id": "lmcache_default_instance", "location": "LocalCPUBackend"}
ANSWER = {"event_id": "e1", "num_tokens": 3}


def event(state: str = "done", **changes: Any) -> dict[str, Any]:
    running = state in ("queued", "running")
    done = 1 if running else 3
    part = {
        "instance_id": "a",
        "location": "ram",
        "worker_ids": [0],
        "chunks_done": done,
        "chunks": 3,
        "bytes_before": 2048 * done,
        "bytes_after": 512 * done,
    }
    about = {"operation": "compress", "instance_id": "a", "location": "ram", "ratio": 4.0}
    return event_in(state, part, **{**about, **changes})


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("pin", "1", "2"), {"path": "/pin", "tokens": [1, 2]}),
        (
            ("pin", "1", "--ttl", "60", "--owner", "me"),
            {"path": "/pin", "tokens": [1], "ttl_s": 60.0, "owner": "me"},
        ),
        (("unpin", "1", "2"), {"path": "/unpin", "tokens": [1, 2]}),
        (("unpin", "--pin", "e1"), {"path": "/unpin", "pin_id": "e1"}),
        (("clear", "1"), {"path": "/clear", "tokens": [1]}),
        (("clear", "--all", "--force"), {"path": "/clear", "force": True}),
        (("compress", "1"), {"path": "/compress", "tokens": [1], "method": "cachegen"}),
        (("compress", "--all", "--method", "z"), {"path": "/compress", "method": "z"}),
        (("decompress", "--all"), {"path": "/decompress", "method": "cachegen"}),
    ],
)
def test_what_is_written_is_sent(
    start: Start, arguments: tuple[str, ...], asked: dict[str, object]
) -> None:
    server = start(ANSWER)
    result = kit(*arguments, "--url", server.url)
    assert result.exit_code == 0, result.output
    assert server.asked == [{**PLACE, **asked}]


def test_what_they_have_in_common_is_sent(start: Start) -> None:
    server = start(ANSWER)
    kit(
        *("clear", "--all", "--url", server.url, "--instance", "b", "--location", "ram"),
        *("--model", "m", "--cache-salt", "s", "--deadline", "5", "--idempotency-key", "k"),
    )
    assert server.asked == [
        {
            "path": "/clear",
            "instance_id": "b",
            "location": "ram",
            "model": "m",
            "cache_salt": "s",
            "deadline_s": 5.0,
            "idempotency_key": "k",
        }
    ]


def test_tokens_may_come_from_a_pipe(start: Start) -> None:
    server = start(ANSWER)
    kit("pin", "--url", server.url, stdin='{"count": 2, "tokens": [4, 5]}')
    assert server.asked[0]["tokens"] == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("clear",), "", "the standard input holds no JSON"),
        (("clear",), "[]", "there are no tokens; everything is --all"),
        (("compress",), "[]", "there are no tokens; everything is --all"),
        (("clear", "1", "--all"), "", "name tokens or --all, not both"),
        (("pin", "1", "--file", "x"), "", "name TOKENS or a --file, not both"),
        (("events", "--wait"), "", "need an EVENT_ID"),
        (("events", "e1", "--state", "done"), "", "an EVENT_ID needs no filter"),
        (("events", "../pins"), "", "'../pins' is no event id"),
    ],
)
def test_a_wrong_call_is_a_usage_error(
    arguments: tuple[str, ...], stdin: str, message: str
) -> None:
    result = kit(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("pin", "1", "2", "3", "4"), "Pinned 3 of 4 tokens (event e1)"),
        (("unpin", "1"), "Unpinned 3 tokens (event e1)"),
        (("clear", "--all"), "Cleared 3 tokens (event e1)"),
        (("compress", "--all"), "Compressing 3 tokens (event e1)"),
    ],
)
def test_the_count_is_said_in_words(start: Start, arguments: tuple[str, ...], line: str) -> None:
    result = kit(*arguments, "--url", start({**ANSWER, "message": "Because."}).url)
    assert result.stdout.splitlines()[:2] == [line, "Because."]


def test_one_token_is_no_tokens(start: Start) -> None:
    result = kit("unpin", "1", "--url", start({"event_id": "e1", "num_tokens": 1}).url)
    assert result.stdout == "Unpinned 1 token (event e1)\n"


def test_without_wait_it_says_how_to_follow(start: Start) -> None:
    result = kit("compress", "--all", "--url", start(ANSWER).url)
    assert result.stdout.splitlines()[-1] == "Follow it with: lmcache-kit events e1 --wait"


def test_json_is_the_controllers_answer(start: Start) -> None:
    assert json.loads(kit("pin", "1", "--json", "--url", start(ANSWER).url).stdout) == ANSWER


def test_a_refusal_is_said_in_the_controllers_words(start: Start) -> None:
    answer = {"error": {"code": "x", "message": "unknown method 'z'", "hint": "Known: cachegen"}}
    result = kit("compress", "--all", "--url", start(answer, status=404).url)
    assert result.exit_code == 1
    assert "Error: unknown method 'z'. Known: cachegen" in result.stderr


# Following.


def test_wait_shows_lines_in_a_pipe_and_then_the_end(start: Start) -> None:
    server = start(ANSWER, event("queued"), event("running"), event("running"), event())
    result = kit("compress", "--all", "--wait", "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout == ("done: 12 tokens; 3 of 3 chunks; 6.0 KiB became 1.5 KiB, ratio 4.00\n")
    assert result.stderr == "queued: 1 of 3 chunks\nrunning: 1 of 3 chunks\n"
    assert [asked["path"] for asked in server.asked[1:]] == ["/events/e1"] * 4


@pytest.mark.parametrize(
    ("state", "status"),
    [("done", 0), ("partial", 0), ("failed", 1), ("cancelled", 1), ("expired", 1)],
)
def test_the_exit_status_tells_how_it_ended(start: Start, state: str, status: int) -> None:
    result = kit("events", "e1", "--wait", "--url", start(event(state, message="so")).url)
    assert result.exit_code == status
    assert result.stdout.startswith(f"{state}: 12 tokens")
    assert result.stdout.endswith("; so\n")


def test_wait_with_json_prints_the_event_alone(start: Start) -> None:
    server = start(ANSWER, event("running"), event())
    result = kit("decompress", "--all", "--wait", "--json", "--url", server.url)
    assert json.loads(result.stdout) == event()


def test_an_interrupt_says_that_the_operation_goes_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_follow.time, "sleep", interrupt)
    result = kit("events", "e1", "--wait", "--url", start(event("running")).url)
    assert result.exit_code == 1
    assert "lmcache-kit events e1 --cancel" in result.stderr


def test_on_a_terminal_there_is_a_live_bar(start: Start) -> None:
    server = start(ANSWER, event("running"), event())
    done = on_a_terminal("compress", "--all", "--wait", "--url", server.url, columns=120)
    assert done.returncode == 0
    assert done.stdout.startswith("done: 12 tokens")
    assert "compress, running" in done.screen
    assert "━" in done.screen
    assert "1 of 3 chunks" in done.screen


# Listing.


def test_events_are_listed(start: Start) -> None:
    server = start({"events": [event(), event("running", ratio=None)]})
    result = kit("events", "--state", "done", "--limit", "2", "--url", server.url)
    assert server.asked[0]["path"] == "/events?state=done&limit=2"
    heads, first, second = (line.split() for line in result.stdout.splitlines())
    assert heads[:5] == ["event", "operation", "instance", "location", "state"]
    assert first[:8] == ["e1", "compress", "a", "ram", "done", "12", "3/3", "4.00"]
    assert second[4:8] == ["running", "12", "1/3", "-"]


def test_one_event_is_shown_or_cancelled(start: Start) -> None:
    server = start(event("cancelled"))
    result = kit("events", "e1", "--cancel", "--url", server.url)
    assert [asked["path"] for asked in server.asked] == ["/events/e1/cancel", "/events/e1"]
    assert "cancelled" in result.stdout


def test_no_events_and_no_pins_are_said_in_words(start: Start) -> None:
    answer = {"events": [], "pins": [], "unanswered": []}
    assert kit("events", "--url", start(answer).url).stdout == "There are no events.\n"
    assert kit("pins", "--url", start(answer).url).stdout == "There are no pins.\n"


def test_pins_are_listed_and_who_did_not_answer(start: Start) -> None:
    pin = {
        "pin_id": "e1",
        "instance_id": "a",
        "location": "ram",
        "num_tokens": 12,
        "chunks": 3,
        "bytes": 3 * 1024 * 1024,
        "owner": "",
        "expires_in_s": 59.6,
    }
    server = start({"pins": [pin, {**pin, "expires_in_s": None}], "unanswered": ["b"]})
    result = kit("pins", "--instance", "a", "--url", server.url)
    assert server.asked[0]["path"] == "/pins?instance_id=a"
    _, first, second = (line.split() for line in result.stdout.splitlines())
    assert first == ["e1", "a", "ram", "12", "3.0", "MiB", "-", "60", "s"]
    assert second[-1] == "never"
    assert result.stderr == "Instance b did not answer.\n"


@pytest.mark.parametrize(
    "arguments",
    [("pin", "1"), ("events",), ("events", "e1"), ("events", "e1", "--wait"), ("pins",)],
)
def test_an_answer_that_is_none_is_reported(start: Start, arguments: tuple[str, ...]) -> None:
    result = kit(*arguments, "--url", start({"hello": 1}).url)
    assert result.exit_code == 1
    assert "what answered is no controller" in result.stderr


@pytest.mark.parametrize("module", ["lookup", "operations", "events", "move"])
def test_the_commands_that_ask_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, lmcache_kit.cli.{module}\n"
        "print([m for m in ('torch', 'vllm', 'aiohttp', 'zmq', 'numpy') if m in sys.modules])"
    )
    assert run_python(code) == "[]\n"
