"""Pages of hooks, declarations and interfaces: what the sources say, in their order."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lmcache_kit import errors, hookspecs, interfaces, layout, specs
from lmcache_kit.interfaces import (
    backend,
    cache,
    codec,
    commands,
    eviction,
    frontend,
    memory,
    operations,
    routes,
    transport,
)

INDEX = "reference/interfaces/index.md"
HOOKS = "reference/hooks.md"
ERRORS = "reference/errors.md"
MODULES: dict[ModuleType, str] = {
    backend: "Backends",
    memory: "Memory",
    codec: "Codecs",
    layout: "Layout of KV",
    transport: "Transports",
    frontend: "Frontends",
    routes: "Routes of plugins",
    commands: "Commands of plugins",
    operations: "Orders",
    eviction: "Eviction policies",
    cache: "Caches",
}

_ROLE = re.compile(r":(?:class|meth|mod|data|func|attr):`~?([\w.]+)`")
_LITERAL = re.compile(r"``(.+?)``", flags=re.DOTALL)
_DOCTEST = re.compile(r"^>>> .*(?:\n\S.*)*", flags=re.MULTILINE)
_SIDE_COMMENT = re.compile(r"  # (type|noqa): ?.*$", flags=re.MULTILINE)


class Name(NamedTuple):
    """A name that a module makes: an alias, or a constant."""

    name: str
    source: str
    doc: str


def pages() -> dict[str, str]:
    """Text by page."""
    found = {page_of(module): _module_page(module, title) for module, title in MODULES.items()}
    return {**found, INDEX: _index(), HOOKS: _hooks()}


def page_of(module: ModuleType) -> str:
    """The page of a module of interfaces."""
    return f"reference/interfaces/{module.__name__.rpartition('.')[2]}.md"


def classes(module: ModuleType) -> list[ast.ClassDef]:
    """The public classes of a module, as they are written."""
    return [node for node in _tree(module).body if isinstance(node, ast.ClassDef) and _public(node)]


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public methods and properties that a class has of its own."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and _public(child):
            yield child


def names(module: ModuleType) -> Iterator[Name]:
    """Public aliases and constants of a module, each with what is said below it."""
    body = _tree(module).body
    for at, node in enumerate(body):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            yield Name(target.id, ast.unparse(node), _said_below(body, at))


def prose(doc: str | None, here: str = "") -> str:
    """A docstring as Markdown, for the page ``here``."""
    text = _ROLE.sub(lambda match: _reference(match[1], here), inspect.cleandoc(doc or ""))
    text = _LITERAL.sub(lambda match: f"`{' '.join(match[1].split())}`", text)
    return _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table, without columns that are empty; nothing without rows."""
    if not rows:
        return ""
    kept = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(line[at]) for at in kept)} |" for line in lines)


def _cell(text: str) -> str:
    """On one line; a bar is the end of a cell, except in code."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return "`".join(parts)


def _reference(path: str, here: str) -> str:
    """A name in code, and a link where it has a place in these pages."""
    parts = path.split(".")
    up = "../" * here.count("/")
    if hasattr(errors, parts[-1]):
        return f"[`{parts[-1]}`]({up}{ERRORS}#{parts[-1]})"
    for module in MODULES:
        for node in classes(module):
            if node.name in parts:
                rest = parts[parts.index(node.name) :]
                page = page_of(module)
                link = "" if page == here else up + page
                return f"[`{'.'.join(rest)}`]({link}#{'.'.join(rest)})"
    return f"`{parts[-1]}`"


def _index() -> str:
    rows = []
    for module, title in MODULES.items():
        page = page_of(module).rpartition("/")[2]
        for node in classes(module):
            summary = prose(ast.get_docstring(node), INDEX).split("\n\n")[0]
            rows.append((f"[`{node.name}`]({page}#{node.name})", title, summary))
    return "\n\n".join(
        [
            "# Interfaces",
            f"{interfaces.__doc__} Plugins implement those that have abstract methods, and get the "
            "others. Import them from `lmcache_kit.interfaces`, and what is not there from the "
            "module that its page names.",
            table(("Class", "Of", "What it is"), rows),
        ]
    )


def _module_page(module: ModuleType, title: str) -> str:
    here = page_of(module)
    parts = [f"# {title}", prose(module.__doc__, here), f"Module `{module.__name__}`."]
    for node in sorted(classes(module), key=_is_passive):
        parts += _class_parts(module, node, here)
    loose = list(names(module))
    if loose:
        parts.append("## Aliases and constants")
    for each in loose:
        parts += [f"### `{each.name}` {{#{each.name}}}", _code(each.source), prose(each.doc, here)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_passive(node: ast.ClassDef) -> bool:
    """Whether it is a record, and not what a plugin implements or is given."""
    named = {base.id for base in node.bases if isinstance(base, ast.Name)}
    return not named & {"ABC", "Protocol"}


def _class_parts(module: ModuleType, node: ast.ClassDef, here: str) -> Iterator[str]:
    base = _private_base(module, node)
    yield f"## `{node.name}` {{#{node.name}}}"
    yield prose(ast.get_docstring(node), here)
    if base:
        yield prose(ast.get_docstring(base), here)
    fields = (_fields(base) if base else []) + _fields(node)
    yield table(("Field", "Type", "Default", "Meaning"), fields)
    for method in methods(node):
        yield f"### `{method.name}` {{#{node.name}.{method.name}}}"
        yield _code(_signature(module, method))
        yield prose(ast.get_docstring(method), here)


def _private_base(module: ModuleType, node: ast.ClassDef) -> ast.ClassDef | None:
    """The class with an underscore from which it has fields."""
    named = {base.id for base in node.bases if isinstance(base, ast.Name)}
    for each in _tree(module).body:
        if isinstance(each, ast.ClassDef) and each.name in named and not _public(each):
            return each
    return None


def _fields(node: ast.ClassDef) -> list[tuple[str, ...]]:
    return [
        (
            f"`{child.target.id}`",
            f"`{ast.unparse(child.annotation)}`",
            f"`{ast.unparse(child.value)}`" if child.value else "",
            prose(_said_below(node.body, at)),
        )
        for at, child in enumerate(node.body)
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
    ]


def _said_below(body: list[ast.stmt], at: int) -> str:
    """The string that stands after a statement."""
    after = body[at + 1] if at + 1 < len(body) else None
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        return str(after.value.value)
    return ""


def _hooks() -> str:
    parts = [
        "# Hooks and declarations",
        prose(hookspecs.__doc__, HOOKS),
        "[Hooks](../hooks.md) has an example, and what happens when one is wrong.",
        "## Hooks",
    ]
    for node in _tree(hookspecs).body:
        if isinstance(node, ast.FunctionDef):
            parts += [
                f"### `{node.name}` {{#{node.name}}}",
                _code(_signature(hookspecs, node)),
                prose(ast.get_docstring(node), HOOKS),
            ]
    parts += ["## Declarations", prose(specs.__doc__, HOOKS)]
    for each in classes(specs):
        parts += _class_parts(specs, each, HOOKS)
    return "\n\n".join(part for part in parts if part) + "\n"


def _signature(module: ModuleType, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Its head with its decorators, as it is written."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
    lines = _source(module).splitlines()[first : node.body[0].lineno - 1]
    return _SIDE_COMMENT.sub("", textwrap.dedent("\n".join(lines))).rstrip().removesuffix(":")


def _code(source: str) -> str:
    return f"```python\n{source}\n```"


def _public(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return not node.name.startswith("_")


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(_source(module))


def _source(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()
