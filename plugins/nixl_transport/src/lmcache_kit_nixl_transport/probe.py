"""Probe whether NIXL is installed, without importing it."""

from __future__ import annotations

from importlib.util import find_spec

MODULES = ("nixl", "nixl_cu12", "nixl_cu13")
"""Packages that may hold NIXL's Python API: a backend's wheel alone has no ``nixl``."""


def why_not() -> str:
    """Return why this transport cannot be used here, and the remedy; empty if it can."""
    if not any(find_spec(name) for name in MODULES):
        return (
            f"NIXL is not installed (none of {', '.join(MODULES)}): "
            "pip install 'lmcache-kit-nixl-transport[nixl]'; where torch for CUDA is not wanted, "
            "a backend's wheel is enough: pip install --no-deps nixl-cu12 && pip install numpy"
        )
    if not find_spec("numpy"):
        return "NIXL is installed and numpy, which it needs, is not: pip install numpy"
    return ""
