"""The core names no plugin of this repository, except in one table that is data."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

from lmcache_kit.first_party import FIRST_PARTY

CORE = Path(__file__).parent.parent / "lmcache_kit"
TABLE = CORE / "first_party.py"

PROTOCOLS = {"http", "tcp"}
"""Plugins that are called like a protocol. Only a text that is nothing but the name counts."""

URL_SCHEMES = {("protocol/address.py", "tcp")}
"""Where such a text is a scheme of URLs."""


def words(path: Path) -> Iterator[str]:
    """Yield the identifiers of a module, and its texts without examples that doctest runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield prose(node.value)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.alias):
            yield node.name


def prose(text: str) -> str:
    if ">>> " not in text:
        return text
    parts = doctest.DocTestParser().parse(text)
    return " ".join(part for part in parts if isinstance(part, str))


def test_the_core_names_no_plugin_of_ours_but_in_one_table() -> None:
    distinct = [each.name for each in FIRST_PARTY if each.name not in PROTOCOLS]
    anywhere = re.compile(rf"\b({'|'.join(distinct)})\b|lmcache[-_]kit[-_]({_distributions()})\b")
    found = set()
    for path in sorted(CORE.rglob("*.py")):
        short = str(path.relative_to(CORE))
        if path == TABLE or short.startswith("testing/"):
            continue
        for word in words(path):
            if anywhere.search(word) or (word in PROTOCOLS and (short, word) not in URL_SCHEMES):
                found.add((short, word[:80]))
    assert found == set()


def _distributions() -> str:
    names = [each.distribution.removeprefix("lmcache-kit-") for each in FIRST_PARTY]
    return "|".join(name.replace("-", "[-_]") for name in names)
