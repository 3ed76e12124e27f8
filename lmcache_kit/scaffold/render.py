"""Rendering of templates into a folder, as a whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template

from lmcache_kit import __version__
from lmcache_kit.hookspecs import ENTRY_POINT_GROUP
from lmcache_kit.scaffold.names import KINDS, Project, ScaffoldError

_SUFFIX = ".tmpl"
_USE = "use.md"
"""Template of the README's section about the kind; not a file of its own."""


def render(
    kind: str, name: str, folder: Path, *, distribution: str = "", offer: str = ""
) -> list[Path]:
    """Write a plugin to ``folder``, which must be missing or empty; return its files, sorted.

    ``distribution`` and ``offer`` default to ``name``. Raises ScaffoldError for unusable names and
    for a folder with files in it, and OSError; nothing is left behind then.
    """
    project = Project.named(kind, name, distribution=distribution, offer=offer)
    texts = rendered(project)
    if folder.is_symlink() or (folder.exists() and not _is_empty(folder)):
        raise ScaffoldError(
            f"{folder} exists and is not an empty folder",
            hint="Choose another folder with --into, or remove it",
        )
    if not folder.parent.is_dir():
        raise ScaffoldError(
            f"{folder.parent} is no folder", hint=f"Create it first: mkdir -p {folder.parent}"
        )
    with _beside(folder) as building:
        for path, text in texts.items():
            file = building / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        building.rename(folder)
    return sorted(folder / path for path in texts)


def rendered(project: Project) -> dict[PurePosixPath, str]:
    """Return every file of the distribution: its path within, and its text."""
    values = _values(project)
    templates = files("lmcache_kit.scaffold") / "templates"
    values["use"] = _filled(templates / project.kind / f"{_USE}{_SUFFIX}", values)
    package = PurePosixPath("src", project.package)
    texts = {package / "py.typed": ""}
    for group in ("common", project.kind):
        for template in (templates / group).iterdir():
            name = template.name.removesuffix(_SUFFIX)
            if name not in (_USE, template.name):
                texts[_place(name, package)] = _filled(template, values)
    return texts


def requirement() -> str:
    """Return the requirement of a plugin made today: a minor version may change an interface."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    return f"lmcache-kit>={major}.{minor},<{major}.{minor + 1}"


def _values(project: Project) -> dict[str, str]:
    needed = sorted((requirement(), *KINDS[project.kind]))
    return {
        "cls": project.class_name,
        "dependencies": "\n".join(f'  "{each}",' for each in needed),
        "distribution": project.distribution,
        "group": ENTRY_POINT_GROUP,
        "kind": project.kind,
        "link": project.class_name.removesuffix("Transport") + "Link",
        "offer": project.offer,
        "package": project.package,
        "requirement": requirement(),
    }


def _filled(template: Traversable, values: dict[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def _place(name: str, package: PurePosixPath) -> PurePosixPath:
    if name == "gitignore":
        return PurePosixPath(".gitignore")
    if name.startswith("test_"):
        return PurePosixPath("tests", name)
    return package / name if name.endswith(".py") else PurePosixPath(name)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Yield a folder to build in, on the same file system; remove it unless it was renamed."""
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    building.mkdir()
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
