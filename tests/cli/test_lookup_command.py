"""``lmcache-kit lookup`` against servers of all kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lmcache_kit.cli.app import app
from tests.cli.conftest import Start

ANSWER = {
    "event_id": "e1",
    "one": ["LocalCPUBackend", 3],
    "layout_info": {"one": ["LocalCPUBackend", 3]},
    "detail": {"one": [{"location": "LocalCPUBackend", "tokens": 3, "stopped": "end"}]},
}


def lookup(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["lookup", *arguments], input=stdin)


def test_tokens_may_be_arguments(start: Start) -> None:
    server = start(ANSWER)
    result = lookup("1", "2", "3", "--url", server.url)
    assert server.asked == [{"path": "/lookup", "tokens": [1, 2, 3], "detail": True}]
    assert result.stdout.split() == [
        *("instance", "location", "tokens", "stopped"),
        *("one", "LocalCPUBackend", "3", "of", "3", "end"),
    ]


@pytest.mark.parametrize("text", ["[4, 5]", '{"count": 2, "tokens": [4, 5], "token_strs": null}'])
def test_tokens_may_come_from_the_standard_input(start: Start, text: str) -> None:
    server = start(ANSWER)
    assert lookup("--url", server.url, stdin=text).exit_code == 0
    assert server.asked[0]["tokens"] == [4, 5]


def test_tokens_may_come_from_a_file(start: Start, tmp_path: Path) -> None:
    server = start(ANSWER)
    (tmp_path / "tokens.json").write_text("[6]")
    assert lookup("--file", str(tmp_path / "tokens.json"), "--url", server.url).exit_code == 0
    assert server.asked[0]["tokens"] == [6]


def test_filters_and_the_token_are_sent(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(ANSWER)
    monkeypatch.setenv("LMCACHE_KIT_TOKEN", "secret")
    lookup("1", "--model", "m", "--cache-salt", "s", "--instance", "one", "--url", server.url)
    assert (
        server.asked[0].items() >= {"model": "m", "cache_salt": "s", "instance_id": "one"}.items()
    )
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_json_is_the_controllers_answer(start: Start) -> None:
    server = start(ANSWER)
    result = lookup("1", "--json", "--url", server.url)
    assert json.loads(result.stdout) == ANSWER
    assert "detail" not in server.asked[0]


def test_nobody_holding_them_is_said_in_words(start: Start) -> None:
    server = start({"event_id": "e", "layout_info": {}, "detail": {}})
    result = lookup("1", "2", "--url", server.url)
    assert (result.exit_code, result.stdout) == (0, "No instance holds KV of these tokens.\n")


def test_lmcaches_own_controller_is_understood(start: Start) -> None:
    server = start({"event_id": "e", "layout_info": {"one": ["LocalCPUBackend", 2]}})
    result = lookup("1", "2", "--url", server.url)
    assert result.stdout.splitlines()[1].split() == ["one", "LocalCPUBackend", "2", "of", "2"]


def test_the_token_does_not_follow_a_redirect(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = start(ANSWER)
    server = start(ANSWER, status=302, location=elsewhere.url)
    monkeypatch.setenv("LMCACHE_KIT_TOKEN", "secret")
    assert lookup("1", "--url", server.url).exit_code == 1
    assert elsewhere.headers == []


def test_a_proxy_in_the_environment_is_not_used(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert lookup("1", "--url", start(ANSWER).url).exit_code == 0


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (
            {"error": {"code": "invalid", "message": "token 1 is negative", "hint": "Send ids"}},
            422,
            "Error: token 1 is negative. Send ids",
        ),
        (b"<html>", 404, "answered with status 404 Not Found"),
        ({"error": "text"}, 500, "answered with status 500"),
        (b"<html>", 200, "did not answer with JSON; is it a controller?"),
        (b"", 307, "answered with status 307"),
        ({"event_id": "e"}, 200, "what answered is no controller"),
        ({"detail": {"one": [{}]}}, 200, "what answered is no controller"),
        ([1], 200, "did not answer with a JSON object; is it a controller?"),
    ],
)
def test_an_answer_that_is_none_is_reported(
    start: Start, answer: object, status: int, message: str
) -> None:
    result = lookup("1", "--url", start(answer, status=status).url)
    assert result.exit_code == 1
    assert message in result.stderr


def test_no_controller_says_how_to_start_one(start: Start) -> None:
    server = start(ANSWER)
    server.shutdown()
    server.server_close()
    result = lookup("1", "--url", server.url)
    assert result.exit_code == 1
    assert f"no controller answers at {server.url}/lookup" in result.stderr
    assert "lmcache-kit controller" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ((), "not json", "the standard input holds no JSON"),
        ((), '{"prompt": "x"}', "neither a list of token ids nor one under 'tokens'"),
        ((), "[1, true]", "neither a list of token ids"),
        (("--file", "/nonexistent"), "", "/nonexistent holds no JSON"),
        (("x",), "", "'x' is not a valid integer"),
        (("1", "--url", "file:///etc/passwd"), "", "does not start with http:// or https://"),
    ],
)
def test_a_wrong_call_is_a_usage_error(
    arguments: tuple[str, ...], stdin: str, message: str
) -> None:
    result = lookup(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert message in result.stderr
