"""The rules of the house, read from the sources."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lmcache_kit import hookspecs

ROOT = Path(__file__).parent.parent
CORE = ROOT / "lmcache_kit"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
MAX_LINES = 500

MODULES = sorted(
    path for folder in (CORE, *(each / "src" for each in PLUGINS)) for path in folder.rglob("*.py")
)

FLOORS = (
    ("errors", "layout", "metrics"),
    ("keys",),
    ("interfaces", "specs"),
    ("hookspecs", "first_party"),
    ("cache",),
    ("plugins",),
    ("config",),
    ("protocol",),
    ("peer",),
    ("agent", "controller"),
    ("process",),
    ("service",),
    ("vllm",),
    ("cli",),
)
"""Rooms of the core, the lowest first. A module imports from its own room and from lower floors."""

BESIDE = {
    "testing": {
        "errors",
        "layout",
        "keys",
        "metrics",
        "interfaces",
        "specs",
        "hookspecs",
        "plugins",
    },
    "scaffold": {"errors", "specs", "hookspecs", "plugins"},
    "_pytest_plugin": {"testing"},
}
"""Rooms beside the floors, with the rooms that each may use. ``cli`` alone uses them."""


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, for_types: bool = False) -> Iterator[str]:
    """Yield every module that a file imports; ``for_types``: also under ``if TYPE_CHECKING``."""
    yield from _imports(ast.parse(path.read_text()), for_types)


def _imports(node: ast.AST, for_types: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if is_typing and not for_types:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imports(child, for_types)


def importers(*packages: str) -> set[str]:
    return {
        short(path) for path in MODULES for name in imports(path) if name.split(".")[0] in packages
    }


def dotted(path: Path) -> str:
    """Return the name under which a module is imported."""
    root = next(parent for parent in path.parents if parent.name == "src" or parent == ROOT)
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_a_module_has_at_most_500_lines() -> None:
    lines = {short(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_imports_go_down_the_floors_and_never_up() -> None:
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    found = set()
    for path in CORE.rglob("*.py"):
        here = room(dotted(path))
        for name in imports(path, for_types=True):
            there = room(name) if name.startswith("lmcache_kit.") else ""
            if there in {"", here, "__version__"}:
                continue
            if here in BESIDE:
                allowed = there in BESIDE[here]
            else:
                allowed = there in floor and floor[there] < floor[here]
                allowed = allowed or (here == "cli" and there in BESIDE)
            if not allowed:
                found.add(f"{short(path)} -> {name}")
    assert found == set()


def _modules_used(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules that a file imports; of ``from package import module`` only the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


def test_no_modules_import_each_other_in_a_circle_not_even_for_types() -> None:
    modules = {dotted(path): path for path in MODULES}
    uses = {module: set(_modules_used(path, modules)) for module, path in modules.items()}
    # Take modules without imports away, again and again: circles and their users remain.
    while leaves := {module for module, used in uses.items() if not used}:
        uses = {module: used - leaves for module, used in uses.items() if module not in leaves}
    # Take modules without users away: circles remain.
    while tops := uses.keys() - {name for used in uses.values() for name in used}:
        uses = {module: used for module, used in uses.items() if module not in tops}
    assert uses == {}


def test_only_the_plugins_package_and_the_hook_specs_import_pluggy() -> None:
    assert importers("pluggy") == {"lmcache_kit/hookspecs.py", "lmcache_kit/plugins/discovery.py"}


def test_only_the_vllm_package_imports_vllm_and_torch() -> None:
    found = importers("vllm", "torch")
    assert found
    assert all(name.startswith("lmcache_kit/vllm/") for name in found)


def test_heavy_dependencies_belong_to_plugins() -> None:
    heavy = ("aiohttp", "nixl", "numpy", "numba", "zstandard", "prometheus_client")
    core = {name for name in importers(*heavy) if name.startswith("lmcache_kit/")}
    assert {name for name in core if not name.startswith("lmcache_kit/vllm/")} == set()


def test_nobody_unpickles_or_evaluates() -> None:
    found = importers("pickle", "cloudpickle", "dill", "marshal", "shelve")
    called = {
        short(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"eval", "exec"}
    }
    assert found | called == set()


def test_the_core_knows_no_plugin() -> None:
    packages = {f"lmcache_kit_{each.name}" for each in PLUGINS}
    core = {name for name in importers(*packages) if name.startswith("lmcache_kit/")}
    assert core == set()


@pytest.mark.parametrize("plugin", ["disk_backend", "valkey_backend"])
def test_a_tiers_plugin_knows_nothing_of_the_core_but_what_is_published(plugin: str) -> None:
    sources = (ROOT / "plugins" / plugin / "src").rglob("*.py")
    used = {name for path in sources for name in imports(path) if name.startswith("lmcache_kit.")}
    published = ("hookspecs", "specs", "interfaces", "errors")
    assert used
    assert {name for name in used if name.split(".")[1] not in published} == set()


def test_the_engine_and_the_contracts_know_no_sockets() -> None:
    found = {
        (short(path), name)
        for package in ("cache", "interfaces")
        for path in (CORE / package).rglob("*.py")
        for name in imports(path)
        if name.startswith(("socket", "asyncio", "zmq"))
    }
    assert found == set()


def test_exceptions_of_all_kinds_are_caught_only_with_a_reason_or_raised_again() -> None:
    found = set()
    for path in MODULES:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "Exception"
            reraised = isinstance(node.body[-1], ast.Raise)
            around = " ".join(lines[node.lineno - 2 : node.body[0].lineno])
            reason = re.search(r"# (?!noqa: \w+ *$)\w+", around.replace("# noqa: BLE001 - ", "# "))
            if re.search(r"\b(Base)?Exception\b", caught) and not (reraised or reason):
                found.add(f"{short(path)}:{node.lineno}")
    assert found == set()


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_a_plugins_names_follow_one_rule(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    package = f"lmcache_kit_{folder.name}"
    assert project["project"]["name"] == f"lmcache-kit-{folder.name.replace('_', '-')}"
    assert (folder / "src" / package / "py.typed").exists()
    assert (folder / "README.md").exists()
    entry_points = project["project"]["entry-points"][hookspecs.ENTRY_POINT_GROUP]
    assert entry_points == {folder.name: f"{package}.plugin"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == [f"src/{package}"]


def test_every_hook_is_documented_with_its_arguments() -> None:
    specs = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse((CORE / "hookspecs.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    documented = re.findall(
        r"^\| `(\w+)\((.*?)\)` \|", (ROOT / "docs" / "hooks.md").read_text(), flags=re.MULTILINE
    )
    assert {
        name: arguments.split(", ") if arguments else [] for name, arguments in documented
    } == specs


@pytest.mark.parametrize(
    "path", [path for path in MODULES if ">>> " in path.read_text()], ids=short
)
def test_examples_in_docstrings_run(path: Path) -> None:
    root = next(parent for parent in path.parents if parent.name == "src" or parent == ROOT)
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted or "doctest: +SKIP" in path.read_text()
    assert result.failed == 0


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("*.md"), *ROOT.glob("plugins/*/*.md")]),
    ids=short,
)
def test_links_outside_of_the_documentations_site_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
