"""Warnings of a spawned cache process in the log of its client."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_kit.process import log_relay
from lmcache_kit.process.log_relay import LogRelay
from tests.support.clocks import FakeClock

if TYPE_CHECKING:
    from tests.process.conftest import Connect, Eventually


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "c.sock.log"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log_relay, "POLL_S", 0.01)
    caplog.set_level(logging.INFO)


def append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def write(log: Path, *lines: str) -> None:
    append(log, "".join(f"2026-01-31 23:59:59,123 {line}\n" for line in lines))


def test_warnings_and_worse_are_relayed_and_nothing_else(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(LogRelay(log)):
        write(log, "INFO a.b: fine", "WARNING a.b: odd: very", "ERROR a.b: bad", "no line of ours")
        append(log, "Traceback (most recent call last):\nFatal Python error: Segmentation fault\n")
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("WARNING", "cache process: odd: very"),
        ("ERROR", "cache process: bad"),
        ("ERROR", "cache process: Fatal Python error: Segmentation fault"),
    ]


def test_what_was_logged_before_is_not_repeated(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(log, "ERROR a.b: long ago")
    LogRelay(log).close()
    assert not caplog.messages


def test_a_line_that_is_written_in_two_parts_is_relayed_whole(
    log: Path, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    with closing(LogRelay(log)) as relay:
        append(log, "2026-01-31 23:59:59,123 ERR")
        eventually(lambda: relay.position == log.stat().st_size)
        append(log, "OR a.b: bad\n")
        eventually(lambda: caplog.messages == ["cache process: bad"])


def test_a_log_that_begins_anew_is_read_from_its_beginning(
    log: Path, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    write(log, "INFO a.b: a long line of another life, longer than what comes now")
    with closing(LogRelay(log)):
        log.write_text("")
        write(log, "ERROR a.b: new")
        eventually(lambda: caplog.messages == ["cache process: new"])


def test_a_flood_is_cut_off_and_counted(
    log: Path,
    caplog: pytest.LogCaptureFixture,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_relay, "MAX_LINES", 3)
    clock = FakeClock()
    with closing(LogRelay(log, clock=clock)):
        write(log, *["WARNING a.b: again"] * 10)
        eventually(lambda: len(caplog.messages) == 3)
        clock.now += log_relay.WINDOW_S
        eventually(lambda: f"cache process: 7 more warnings and errors are in {log}" in caplog.text)
        write(log, "ERROR a.b: later")
    assert caplog.messages[-1] == "cache process: later"


def test_the_first_worker_of_an_engine_says_where_the_process_logs_and_relays(
    connect: Connect, folder: Path, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    for client in (connect("scheduler"), connect(rank=1, world_size=2), connect()):
        assert client.connected
    where = [each for each in caplog.messages if each.startswith("the cache process logs to")]
    assert where == [
        f"the cache process logs to {folder}/c.sock.log; its warnings and errors come here, too"
    ]
    write(folder / "c.sock.log", "WARNING lmcache_kit.cache: one leak")
    eventually(lambda: "cache process: one leak" in caplog.messages)


def test_the_format_of_the_log_is_the_one_that_the_relay_reads(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter(log_relay.FORMAT))
    theirs = logging.Logger("lmcache_kit.cache.tiers")
    theirs.addHandler(handler)
    with closing(LogRelay(log)), closing(handler):
        theirs.warning("%s does not work", "Disk")
    assert caplog.messages == ["cache process: Disk does not work"]
