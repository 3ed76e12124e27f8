from __future__ import annotations

from pathlib import Path

import pytest
from lmcache_kit_disk_backend.backend import LocalDiskBackend
from lmcache_kit_disk_backend.options import DiskOptions
from pydantic import ValidationError


def test_without_options_it_keeps_5_gib_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = LocalDiskBackend()
    assert store.usage().capacity_bytes == 5 << 30
    assert [path.name for path in tmp_path.iterdir()] == ["lmcache_kit"]
    store.close()


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert DiskOptions(path=Path("~/kv")).path == Path("/somewhere/kv")
    assert DiskOptions().path == Path("/somewhere/.cache/lmcache_kit")


@pytest.mark.parametrize(
    "path", ["kv", "", "./kv", "True", "file:/kv", "file://kv", "s3://bucket/kv"]
)
def test_a_path_that_depends_on_where_the_process_runs_is_refused(path: str) -> None:
    for value in (path, Path(path)):
        with pytest.raises(ValidationError, match=r"must be absolute, such as /var/cache"):
            DiskOptions.model_validate({"path": value})


def test_a_path_may_be_a_url_of_a_file() -> None:
    assert DiskOptions.model_validate({"path": "file:///kv/"}).path == Path("/kv")


@pytest.mark.parametrize("path", ["/a/,/b/", "file:///a, file:///b", "/a,~/b"])
def test_several_paths_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="is several folders; one is expected"):
        DiskOptions.model_validate({"path": path})


@pytest.mark.parametrize("path", ["$HOME/kv", "/data/${USER}", "/data/$(id -u)"])
def test_variables_of_a_shell_in_a_path_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="variables in it are not replaced"):
        DiskOptions.model_validate({"path": path})


def test_the_log_names_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lmcache_kit_disk_backend")
    store = LocalDiskBackend(DiskOptions(path=tmp_path, max_size_gib=2))
    (folder,) = tmp_path.iterdir()
    assert f"blobs are in {folder}: 0 of them, 2.0 GiB at most" in caplog.text
    store.close()


def test_a_home_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValidationError, match="~nobody-has-this-name/kv"):
        DiskOptions(path=Path("~nobody-has-this-name/kv"))


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_a_size_must_be_a_number_over_zero(size: float) -> None:
    with pytest.raises(ValidationError, match="max_size_gib"):
        DiskOptions(max_size_gib=size)


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_size"):
        DiskOptions.model_validate({"max_size": 3})
