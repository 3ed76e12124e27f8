"""``lmcache-kit gc`` lists stores, and removes those that nobody uses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from lmcache_kit_disk_backend.abandoned import find, remove
from lmcache_kit_disk_backend.backend import LocalDiskBackend

from lmcache_kit.cli.app import app
from tests.support.processes import run_python

KEY = bytes(range(16))
DAY_S = 86400.0

OpenStore = Callable[..., LocalDiskBackend]


def gc(*arguments: str | Path, **environ: str) -> Result:
    return CliRunner().invoke(app, ["gc", *map(str, arguments)], env=environ)


def listed(*arguments: str | Path, **environ: str) -> dict[str, str]:
    """The state of each instance's folder."""
    result = gc("--json", *arguments, **environ)
    assert result.exit_code == 0, result.output
    return {str(each["instance"]): each["state"] for each in json.loads(result.output)}


def age(folder: Path, days: float) -> None:
    """Make everything in a folder so old."""
    then = time.time() - days * DAY_S
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then), follow_symlinks=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def fill(open_store: OpenStore) -> Callable[..., LocalDiskBackend]:
    """Open the store of an instance and put a blob."""

    def fill_it(instance: str) -> LocalDiskBackend:
        store = open_store(subfolder=instance)
        store.put(KEY, b"meta", [memoryview(bytes(10_000))])
        return store

    return fill_it


def folder_of(base: Path, instance: str) -> Path:
    [found] = [path for path in base.iterdir() if f'"subfolder": "{instance}"' in owner_file(path)]
    return found


def owner_file(folder: Path) -> str:
    file = folder / "owner.json"
    return file.read_text() if file.exists() else ""


@pytest.fixture
def three(base: Path, fill: Callable[..., LocalDiskBackend]) -> Path:
    """A store in use, one that was used yesterday, and one that was used a month ago."""
    fill("used")
    for instance, days in (("young", 1.0), ("old", 30.0)):
        fill(instance).close()
        age(folder_of(base, instance), days)
    age(folder_of(base, "used"), 30.0)
    return base


def test_without_delete_nothing_is_removed(three: Path) -> None:
    expected = {"used": "in use", "young": "free", "old": "dead"}
    for _ in range(2):
        assert listed("--folder", three) == expected


def test_delete_removes_what_is_free_and_old(three: Path) -> None:
    removed = listed("--folder", three, "--delete")
    assert removed == {"used": "in use", "young": "free", "old": "removed"}
    assert listed("--folder", three) == {"used": "in use", "young": "free"}
    assert len(list(three.iterdir())) == 2


def test_the_age_can_be_chosen(three: Path) -> None:
    removed = listed("--folder", three, "--delete", "--older-than", "12h")
    assert removed == {"used": "in use", "young": "removed", "old": "removed"}


def test_the_table_says_whose_how_large_and_how_old(three: Path) -> None:
    output = gc("--folder", three).output
    [line] = [line for line in output.splitlines() if "dead" in line and "old" in line]
    assert str(folder_of(three, "old")) in line
    assert "30d" in line
    assert f"{os.getpid()} on " in line
    assert "16.0 KiB" in line
    assert "1 of them with 16.0 KiB would be removed with --delete" in output


def test_a_store_goes_on_after_the_rest_was_removed(three: Path, open_store: OpenStore) -> None:
    gc("--folder", three, "--delete")
    assert open_store(subfolder="old").get(KEY) is None
    assert open_store(subfolder="young").get(KEY) is not None


def test_a_store_that_never_said_whose_it_is_is_listed_and_removed(three: Path) -> None:
    folder = folder_of(three, "old")
    (folder / "owner.json").write_text("{")
    age(folder, 30)
    assert listed("--folder", three)["None"] == "dead"
    (folder / "owner.json").unlink()
    age(folder, 30)
    assert "(unknown)" in gc("--folder", three).output
    assert listed("--folder", three, "--delete")["None"] == "removed"


def test_what_is_not_of_a_store_stays(three: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    old = folder_of(three, "old")
    (old / "00" / "notes.txt").write_text("mine")
    (old / "ff").symlink_to(precious)
    (three / ("ab" * 16)).mkdir()
    (three / ("cd" * 16)).symlink_to(old)
    age(old, 30)
    states = listed("--folder", three, "--delete")
    assert states["old"] == "stays: it holds files that are not of a store"
    assert (old / "00" / "notes.txt").read_text() == "mine"
    assert (precious / "file").read_text() == "mine"
    assert (three / ("ab" * 16)).is_dir()
    assert not (old / "00" / KEY.hex()).exists()


def test_the_configuration_names_the_folder(three: Path, tmp_path: Path) -> None:
    file = tmp_path / "kit.yaml"
    file.write_text(f"local_disk: {three}\nmax_local_disk_size: 1\n")
    assert set(listed(LMCACHE_CONFIG_FILE=str(file))) == {"used", "young", "old"}


def test_options_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "kit.yaml"
    file.write_text("tiers: [LocalDiskBackend]\nbackend_options: {LocalDiskBackend: {path: here}}")
    result = gc(LMCACHE_CONFIG_FILE=str(file))
    assert result.exit_code == 1
    assert "'here' must be absolute" in result.output


def test_without_a_configuration_it_is_the_default_folder(three: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "No KV lies in" in gc(XDG_CACHE_HOME=str(cache)).output
    cache.mkdir()
    shutil.copytree(three, cache / "lmcache_kit")
    assert "young" in listed(XDG_CACHE_HOME=str(cache))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--folder", "/no/such/folder"], "there is no such folder"),
        (["--older-than", "soon"], "write it as 12h, 30d or 8w"),
        (["--older-than", "-1d"], "is no age"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], told: str) -> None:
    result = gc(*arguments)
    assert result.exit_code != 0
    assert told in result.output


def test_the_help_has_an_example() -> None:
    assert "lmcache-kit gc --folder" in gc("--help").output


def test_listing_plugins_imports_nothing_heavy() -> None:
    run_python(
        """
        import sys
        from lmcache_kit_disk_backend import plugin
        assert plugin.register_commands()[0].name == "gc"
        assert not {"pydantic", "click", "xxhash"} & set(sys.modules)
        """
    )


def test_a_store_that_is_opened_after_it_was_listed_stays(
    three: Path, open_store: OpenStore
) -> None:
    [old] = [found for found in find(three) if found.owner and found.owner.subfolder == "old"]
    store = open_store(subfolder="old")
    assert remove(old) == "a process uses it"
    assert store.get(KEY) is not None
    store.close()
    assert remove(old) == "it was used just now"
    assert open_store(subfolder="old").get(KEY) is not None
