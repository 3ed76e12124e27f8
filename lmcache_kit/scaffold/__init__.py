"""Complete distributions to start a plugin from; see docs/backend.md and docs/plugins.md."""

from lmcache_kit.scaffold.names import KINDS, Project, ScaffoldError, check_free
from lmcache_kit.scaffold.render import render

__all__ = ["KINDS", "Project", "ScaffoldError", "check_free", "render"]
