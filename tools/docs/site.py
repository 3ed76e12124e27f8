"""What mkdocs is told beside mkdocs.yml: pages made from the sources, and pages that lie elsewhere.

The documents of plugins and of the repository stay where their readers look first; the site has
copies. Links lead to the copies, whichever page they stand on.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

from tools.docs import reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    **{
        f"plugins/{folder.name}/README.md": f"packages/{folder.name}.md"
        for folder in sorted(ROOT.glob("plugins/*"))
        if (folder / "README.md").is_file()
    },
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Documents outside of docs/, and the page of the site that is a copy of each."""
PAGES = ELSEWHERE | {"README.md": "index.md"}

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that are no files in docs/."""
    copies = {page: (ROOT / where).read_text() for where, page in ELSEWHERE.items()}
    for page, text in {**copies, **reference.pages()}.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to pages of the site."""
    here = page.file.src_uri
    origin = next((path for path, uri in ELSEWHERE.items() if uri == here), f"docs/{here}")
    return follow(markdown, origin, here)


def follow(markdown: str, origin: str, here: str) -> str:
    """The text of the document ``origin`` (a path in the repository) as the page ``here``."""

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        page = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(page, posixpath.dirname(here) or ".") + (match[2] or "")

    parts = _CODE.split(markdown)
    return "".join(part if at % 2 else _LINK.sub(lead, part) for at, part in enumerate(parts))
