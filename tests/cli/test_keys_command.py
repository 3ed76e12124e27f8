"""``lmcache-kit keys``, and what is made by it in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lmcache_kit.cli.app import app
from lmcache_kit.keys import Namespace
from lmcache_kit.layout import KVLayout
from lmcache_kit.protocol.zmq_auth import ControllerKeys, WorkerKeys
from tests.cli.running import running_kit
from tests.support.processes import program, run
from tests.support.waiting import eventually


def keys(folder: Path, *workers: str) -> Result:
    named = [part for name in workers for part in ("--worker", name)]
    return CliRunner().invoke(app, ["keys", str(folder), *named])


def files(folder: Path) -> dict[str, int]:
    """Everything in it, with its permissions."""
    return {
        str(path.relative_to(folder)): path.stat().st_mode & 0o777
        for path in [folder, *folder.rglob("*")]
    }


def test_keys_are_made_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "keys"
    result = keys(folder, "gpu-1", "gpu-2")
    assert result.exit_code == 0, result.output
    made = ["controller", "workers/gpu-1", "workers/gpu-2"]
    names = [f"{each}{suffix}" for each in made for suffix in (".key", ".key_secret")]
    assert result.output.splitlines() == [str(folder / name) for name in names]
    assert files(folder) == {".": 0o700, "workers": 0o700, **dict.fromkeys(names, 0o600)}


def test_what_is_made_can_be_loaded(tmp_path: Path) -> None:
    keys(tmp_path / "k", "gpu-1")
    controller = ControllerKeys.load(tmp_path / "k")
    worker = WorkerKeys.load(
        tmp_path / "k" / "controller.key", tmp_path / "k" / "workers" / "gpu-1.key_secret"
    )
    assert worker.controller == controller.public
    assert controller.workers == {worker.public}


def test_a_worker_is_added_later_without_touching_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    keys(folder, "gpu-1")
    before = {path: path.read_bytes() for path in folder.rglob("*.key*")}
    result = keys(folder, "gpu-2")
    assert result.output.splitlines() == [
        str(folder / "workers" / name) for name in ("gpu-2.key", "gpu-2.key_secret")
    ]
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob("*.key*")}.items()


@pytest.mark.parametrize("again", [(), ("gpu-1",), ("gpu-2", "gpu-1")])
def test_nothing_is_overwritten(tmp_path: Path, again: tuple[str, ...]) -> None:
    folder = tmp_path / "k"
    keys(folder, "gpu-1")
    before = {path: path.read_bytes() for path in folder.rglob("*.key*")}
    result = keys(folder, *again)
    assert result.exit_code == 1
    assert "exists and is not overwritten" in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*.key*")} == before


def test_half_a_pair_is_not_completed(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    keys(folder, "gpu-1")
    (folder / "controller.key").unlink()
    assert "controller.key_secret exists" in keys(folder).stderr


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    folder.mkdir(mode=0o700)
    (folder / "controller.key_secret").symlink_to(tmp_path / "elsewhere")
    assert "exists" in keys(folder).stderr
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_workers_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    result = keys(tmp_path / "k", name)
    assert result.exit_code == 1
    assert "is no name for a file" in result.stderr
    assert not (tmp_path / "k").exists()


def test_a_folder_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    folder.mkdir()
    folder.chmod(0o755)
    result = keys(folder)
    assert result.exit_code == 1
    assert f"chmod 700 {folder}" in result.stderr
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot make" in keys(tmp_path / "file" / "k").stderr


# The controller's command.


def refused(*arguments: str, **environ: str) -> tuple[int, str]:
    ports = ("--port", "0", "--monitor-port", "0")
    done = run(program("lmcache_controller"), *ports, *arguments, environ=environ)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_the_network_with_a_token_and_without_keys_is_refused_with_the_remedy() -> None:
    code, told = refused("--host", "0.0.0.0", LMCACHE_KIT_TOKEN="s3cret")
    assert code == 2
    assert "opens the monitor port to the network" in told
    assert "--curve DIR" in told
    assert "--insecure" in told


def test_keys_that_are_not_there_are_named_with_the_command_that_makes_them(
    tmp_path: Path,
) -> None:
    code, told = refused("--curve", str(tmp_path))
    assert code == 2
    assert f"--curve: {tmp_path}/controller.key_secret cannot be read" in told
    assert "lmcache-kit keys" in told


def test_with_keys_and_a_token_the_network_needs_no_insecure(tmp_path: Path) -> None:
    keys(tmp_path / "k", "gpu-1")
    # An address that is not ours, so that nothing is opened: it fails only when it binds.
    code, told = refused(
        "--host", "192.0.2.1", "--curve", str(tmp_path / "k"), LMCACHE_KIT_TOKEN="s3cret"
    )
    assert code == 1
    assert "cannot listen on port 0 of 192.0.2.1" in told
    assert "open to the network" not in told


# All of it.


def test_a_lookup_finds_what_a_cache_process_with_keys_stored(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    keys(folder, "gpu-1")
    namespace = Namespace("some/model", KVLayout("float16", 2, 2, 8), chunk_size=4)
    with running_kit(
        tmp_path,
        list(range(8)),
        namespace,
        flags=("--curve", str(folder)),
        controller_key=folder / "controller.key",
        worker_key=folder / "workers" / "gpu-1.key_secret",
    ) as kit:
        tokens = [str(token) for token in range(8)]
        eventually(lambda: "8 of 8" in kit.run("lookup", *tokens).output)
