"""``lmcache-kit cache-server`` as a process, as a service manager runs it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lmcache_kit.cli.app import app
from tests.support.processes import Program, program, run

PROGRAM = program("lmcache-kit")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "kit.yaml"
    file.write_text(
        f"lmcache_instance_id: one\nmax_local_cpu_size: 0.01\ncache_socket: {tmp_path}/c.sock\n"
    )
    return file


@contextmanager
def running(config: Path) -> Iterator[Program]:
    """A cache server that has said that it is ready."""
    with Program(PROGRAM, "cache-server", "--config", str(config)) as server:
        expected = f"cache-server: instance 'one' at {config.parent}/c.sock; Ctrl-C stops\n"
        assert server.ready == expected
        yield server


def status(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["cache-server", "--config", str(config), "--status", *arguments]
    )


def test_its_figures_can_be_read_while_it_runs(config: Path) -> None:
    with running(config) as server:
        figures = json.loads(status(config, "--json").stdout)
        lines = status(config).stdout.splitlines()
    assert (figures["instance_id"], figures["pid"]) == ("one", server.pid)
    assert figures["location"] == "LocalCPUBackend"
    assert 0 < figures["values"]["capacity_bytes"] <= 0.01 * 1024**3
    assert lines[0].split() == ["name", "location", "value"]
    assert any(line.split() == ["chunks", "0"] for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_takes_its_socket_away(config: Path, number: signal.Signals) -> None:
    with running(config) as server:
        assert (config.parent / "c.sock").exists()
        assert server.exit_code(number) == 0
    assert not (config.parent / "c.sock").exists()


def test_a_second_one_for_the_same_instance_is_refused(config: Path) -> None:
    with running(config):
        second = run(PROGRAM, "cache-server", "--config", str(config))
    assert second.returncode == 1
    assert "another cache process serves at" in second.stderr


def test_no_figures_without_one_and_the_socket_is_named(config: Path) -> None:
    result = status(config)
    assert result.exit_code == 1
    assert f"{config.parent}/c.sock" in result.stderr


def test_it_refuses_a_configuration_that_cannot_be_used(config: Path) -> None:
    config.write_text("chunk_size: many\n")
    result = CliRunner().invoke(app, ["cache-server", "--config", str(config)])
    assert result.exit_code == 1
    assert f"chunk_size: 'many' ({config}:1)" in result.stderr


def test_it_refuses_a_backend_that_is_not_installed(config: Path) -> None:
    result = CliRunner().invoke(
        app, ["cache-server", "--config", str(config)], env={"LMCACHE_KIT_PLUGINS": "-cpu_backend"}
    )
    assert result.exit_code == 1
    assert "backend 'LocalCPUBackend' is provided by plugin 'cpu_backend'" in result.stderr
