"""The site builds, and what its pages show is true of the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from lmcache_kit.config import load_config
from tools.docs import commands, site

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *(ROOT / where for where in site.ELSEWHERE)])
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
WARNED = {"docs/howto/lmcache.md"}
"""Pages that show configurations with keys that are not served."""


def blocks(kind: str) -> list[tuple[str, str]]:
    """Each block of code of a kind, with its page."""
    return [
        (str(page.relative_to(ROOT)), body)
        for page in PAGES
        for _, each, body in BLOCK.findall(page.read_text())
        if each == kind
    ]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    # Never --quiet: warnings that are not shown do not count as errors.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert tmp_path / "reference" / "rest.html" in pages
    fetched = {
        address
        for page in pages
        for address in re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)",
            page.read_text(),
        )
    }
    assert fetched == set()


def test_configurations_that_are_shown_can_be_loaded(tmp_path: Path) -> None:
    shown = blocks("yaml")
    assert len(shown) > 5
    for at, (page, body) in enumerate(shown):
        file = tmp_path / f"{at}.yaml"
        file.write_text(body)
        loaded = load_config(file=file, environ={})
        assert bool(loaded.warnings) == (page in WARNED), page


def test_json_that_is_shown_can_be_read() -> None:
    shown = blocks("json")
    assert shown
    for _, body in shown:
        assert json.loads(body)


def test_commands_that_are_shown_have_these_options() -> None:
    known = {words: _options(words) for words, *_ in commands.commands()}
    known["lmcache_controller"] = known["lmcache-kit controller"]
    checked = 0
    for kind in ("bash", "console"):
        for page, body in blocks(kind):
            for line in re.sub(r"\\\n", " ", body).splitlines():
                checked += _check(page, line.split(" #")[0], known)
    assert checked > 30


def _options(words: str) -> set[str]:
    command = next(command for each, command, _ in commands.commands() if each == words)
    return {option for each in command.params for option in each.opts} | {"--help", "-h"}


def _check(page: str, line: str, known: dict[str, set[str]]) -> bool:
    found = re.search(r"(?:^|[|;&$] *|\s)(lmcache-kit|lmcache_controller)\b([^|;]*)", line)
    if not found or "pip " in line:
        return False
    words = found[2].split()
    names = [f"{found[1]} {words[0]} {words[1]}"] if len(words) > 1 else []
    names += [f"{found[1]} {words[0]}"] if words else []
    name = next((each for each in [*names, found[1]] if each in known), None)
    assert name or words[0] in {"--version", "--help"}, f"{page}: {line}"
    for option in re.findall(r"(?<=\s)--[\w-]+", found[2]):
        assert option in known[name or ""], f"{page}: {line}"
    return True
