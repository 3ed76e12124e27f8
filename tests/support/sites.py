"""Distributions on disk, found as installed ones are."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

_HEAD = "from lmcache_kit.hookspecs import hookimpl\nfrom lmcache_kit.specs import *\n"


@dataclass(frozen=True)
class FakeSite:
    """A folder on the path to install distributions in; their names begin with ``acme``."""

    folder: Path

    def install(
        self,
        distribution: str,
        code: str = "",
        *,
        plugin: str = "",
        group: str = "lmcache_kit.v1",
        version: str = "1.2",
    ) -> None:
        """Install a distribution with one plugin, whose module has the distribution's name."""
        module = distribution.replace("-", "_")
        self.module(module, _HEAD + textwrap.dedent(code))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[{group}]\n{plugin or module} = {module}\n")

    def module(self, name: str, code: str) -> None:
        """Install a module without a distribution."""
        (self.folder / f"{name}.py").write_text(code)
