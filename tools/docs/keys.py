"""The table of keys in ``docs/configuration.md``, made from their declarations.

``python -m tools.docs.keys`` writes it anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lmcache_kit.config.declare import Declaration
from lmcache_kit.config.load import declarations
from lmcache_kit.plugins import Plugins
from tools.docs.source import table

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN = "<!-- keys: python -m tools.docs.keys -->"
END = "<!-- end of keys -->"


def keys_table() -> str:
    """Return the table of all keys, those of this repository's plugins included."""
    rows = [
        (f"`{each.name}`", f"`{json.dumps(each.default)}`", meaning(each))
        for each in declarations(Plugins.load())
    ]
    return table(("Key", "Default", "Meaning"), rows)


def meaning(key: Declaration) -> str:
    """Return the help of a key, with its aliases and its plugin."""
    parts = [key.help]
    if key.aliases:
        parts.append(f"Also written {', '.join(f'`{each}`' for each in key.aliases)}.")
    if key.plugin:
        parts.append(f"A key of `{key.plugin}`.")
    return " ".join(parts)


def main() -> None:
    """Replace the table in the page."""
    text = PAGE.read_text()
    block = f"{BEGIN}\n{keys_table()}\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
