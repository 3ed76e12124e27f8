"""Names and prose use the terms of docs/glossary.md, and only those."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
NOT_USED = dict(
    re.findall(r"^\| ([\w ]+?) \| (.+?) \|$", GLOSSARY.split("## Words that are not used")[1], re.M)
)
del NOT_USED["Not"]
HERE = {"docs/glossary.md", "tests/test_words.py"}
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@cache
def tracked(*suffixes: str) -> tuple[Path, ...]:
    """Files of the tree, those that are not committed yet included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and name not in HERE]
    return tuple(
        path for name in names if (path := ROOT / name).suffix in suffixes and path.is_file()
    )


def words(text: str) -> Iterator[str]:
    """Lower-case words of prose and of identifiers, without a plural's s."""
    for name in re.findall(r"[A-Za-z]+", CAMEL.sub(" ", text.replace("_", " "))):
        yield name.lower()
        yield name.lower().removesuffix("s")


def refused(text: str) -> set[str]:
    return NOT_USED.keys() & set(words(text))


def test_the_glossary_defines_each_term_once() -> None:
    terms = re.findall(r"\*\*(.+?)\*\*", GLOSSARY)
    assert len(terms) > 50
    assert sorted(terms) == sorted(set(terms))


def test_no_word_is_both_used_and_refused() -> None:
    terms = {word for term in re.findall(r"\*\*(.+?)\*\*", GLOSSARY) for word in words(term)}
    assert terms & NOT_USED.keys() == set()


def test_code_uses_no_word_that_the_glossary_refuses() -> None:
    found = []
    for path in tracked(".py"):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type in {tokenize.NAME, tokenize.STRING, tokenize.COMMENT}:
                name = path.relative_to(ROOT)
                found += [f"{name}:{token.start[0]}: {word}" for word in refused(token.string)]
    assert found == []


def test_pages_use_no_word_that_the_glossary_refuses() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in tracked(".md", ".tmpl", ".toml", ".yml", ".yaml")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in refused(line)
    ]
    assert found == []


def test_no_file_or_folder_is_named_by_a_word_that_the_glossary_refuses() -> None:
    found = [
        str(name)
        for path in tracked(".py", ".md", ".svg", ".tmpl")
        if refused(str(name := path.relative_to(ROOT)))
    ]
    assert found == []
