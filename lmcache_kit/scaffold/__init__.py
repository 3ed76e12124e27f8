"""Generator of plugins: ``lmcache-kit new-plugin``. See docs/backend.md and docs/plugins.md.

1. A generated plugin is a complete distribution that passes its conformance suite at once.
2. The code to replace is marked with REPLACE.
3. A plugin is written as a whole or not at all.
4. Generated code uses the published surface only, and the templates ship in the wheel.
"""

from lmcache_kit.scaffold.names import KINDS, Project, ScaffoldError, check_free
from lmcache_kit.scaffold.render import render

__all__ = ["KINDS", "Project", "ScaffoldError", "check_free", "render"]
