"""What is in wheels and sdists."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lmcache_kit import __version__
from lmcache_kit.hookspecs import ENTRY_POINT_GROUP
from tests.packaging.distributions import CORE, EXAMPLE, OURS, PLUGINS, ROOT, SOURCES, Built

pytestmark = pytest.mark.wheels

everything = pytest.mark.parametrize("name", SOURCES)
KINDS_OF_FILES = {".py", ".tmpl"}
HEAVY = {"torch", "vllm", "aiohttp", "nixl", "numpy", "transformers"}
# hatchling adds the last one to every sdist, so that a build from it leaves out the same files.
BESIDE_THE_PACKAGE = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
                      ".gitignore"}  # fmt: skip


def in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return set(wheel.namelist())


def in_sdist(path: Path) -> dict[str, tarfile.TarInfo]:
    """By name, without the folder that all of it is in."""
    with tarfile.open(path) as archive:
        return {each.name.partition("/")[2]: each for each in archive.getmembers()}


@everything
def test_a_wheel_holds_its_package_and_nothing_else(built: dict[str, Built], name: str) -> None:
    names = in_wheel(built[name].wheel)
    about = {each for each in names if ".dist-info/" in each}
    assert names - about == SOURCES[name].files()
    about = {each.partition("/")[2] for each in about}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


@everything
def test_an_sdist_holds_its_package_and_what_building_needs(
    built: dict[str, Built], name: str
) -> None:
    source = SOURCES[name]
    package = {f"{source.packages_in}{file}" for file in source.files()}
    assert set(in_sdist(built[name].sdist)) == package | BESIDE_THE_PACKAGE


@everything
def test_an_sdist_is_files_and_no_links(built: dict[str, Built], name: str) -> None:
    """pip refuses a link that leads out of it."""
    assert all(each.isfile() for each in in_sdist(built[name].sdist).values())


@everything
def test_a_package_is_sources_and_templates_and_says_that_it_is_typed(name: str) -> None:
    files = SOURCES[name].files()
    package = SOURCES[name].package
    assert f"{package}/py.typed" in files
    others = {file for file in files if Path(file).suffix not in KINDS_OF_FILES}
    assert others == {f"{package}/py.typed"}
    parts = {part for file in files for part in Path(file).parts}
    assert parts.isdisjoint({"tests", ".venv", "dist", "build", "__pycache__"})


@everything
def test_a_wheel_built_from_the_sdist_is_the_same(built: dict[str, Built], name: str) -> None:
    with (
        zipfile.ZipFile(built[name].wheel) as one,
        zipfile.ZipFile(built[name].rebuilt) as other,
    ):
        assert one.namelist() == other.namelist()
        assert all(one.read(each) == other.read(each) for each in one.namelist())


@everything
def test_the_metadata_are_what_an_index_shows(built: dict[str, Built], name: str) -> None:
    metadata = built[name].metadata()
    assert metadata["Name"] == name
    assert metadata["Version"] == SOURCES[name].project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (SOURCES[name].folder / "README.md").read_text()
    assert 0 < len(metadata["Summary"]) <= 100


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_is_bound_to_this_minor_version_of_the_core(
    built: dict[str, Built], name: str
) -> None:
    [core] = [
        each
        for each in map(Requirement, built[name].requires())
        if each.name == CORE and not each.extras
    ]
    major, minor = Version(__version__).release[:2]
    assert core.specifier.contains(__version__)
    assert core.specifier.contains(f"{major}.{minor}.99")
    assert not core.specifier.contains(f"{major}.{minor + 1}.0")


@pytest.mark.parametrize("name", OURS)
def test_all_of_ours_have_the_version_of_the_core(name: str) -> None:
    assert SOURCES[name].project["version"] == __version__


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_has_entry_points_for_the_kit_and_no_other(
    built: dict[str, Built], name: str
) -> None:
    with zipfile.ZipFile(built[name].wheel) as wheel:
        [file] = [each for each in wheel.namelist() if each.endswith("/entry_points.txt")]
        groups = re.findall(r"^\[(.*)\]$", wheel.read(file).decode(), flags=re.MULTILINE)
    assert groups == [ENTRY_POINT_GROUP]


def test_the_core_requires_nothing_heavy_and_no_plugin(built: dict[str, Built]) -> None:
    required = {canonicalize_name(Requirement(each).name) for each in built[CORE].requires()}
    assert required.isdisjoint(HEAVY | set(PLUGINS))


@everything
def test_each_has_a_changelog_that_begins_with_its_version(name: str) -> None:
    text = (SOURCES[name].folder / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    [latest, *_] = re.findall(r"^## (\d+\.\d+\.\d+)", text, flags=re.MULTILINE)
    assert latest == SOURCES[name].project["version"]
    sections = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))
    assert sections
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@everything
def test_each_has_the_licence_itself(name: str) -> None:
    licence = SOURCES[name].folder / "LICENSE"
    assert not licence.is_symlink()
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_example_is_outside_of_the_workspace() -> None:
    members = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]
    folders = {path for pattern in members["members"] for path in ROOT.glob(pattern)}
    assert {SOURCES[name].folder for name in OURS} - {ROOT} <= folders
    assert SOURCES[EXAMPLE].folder not in folders
